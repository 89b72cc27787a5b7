"""A host on this machine: an sshd of its own on a loopback port, with its own keys, and a home of its own.

What a person does for a host far away is done for this one: ~/.ssh/config, known_hosts and hosts.json, all in
`directory`. For measurements, and for tests, which give it a Unix user of its own.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from manyhands.errors import WorkerError
from manyhands.ui.processes import free_port


def sshd_program() -> str | None:
    """Where OpenSSH's server is; it is seldom on the PATH of a user."""
    return shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


class LoopbackHost:
    """`server1`, whose home is `<directory>/home`. `client` is the home of who connects."""

    def __init__(self, directory: Path, *, user: str | None = None, home: Path | None = None) -> None:
        self.directory, self.user = directory, user or getpass.getuser()
        self.home, self.client = home or directory / "home", directory / "client"
        self.port = free_port()
        self.sftp: str | None = "internal-sftp"
        self._own_user = user is not None
        self._sshd: subprocess.Popen[bytes] | None = None
        self.home.mkdir(exist_ok=True, parents=True)
        self.new_host_key()
        self.make_key(directory / "client_key")
        shutil.copy(directory / "client_key.pub", directory / "authorized_keys")
        self.set_up_client()

    def set_up_client(self) -> None:
        """In the home of who connects: its key, the host's key, and an entry in hosts.json."""
        ssh = self.client / ".ssh"
        ssh.mkdir(exist_ok=True, parents=True)
        for suffix in ("", ".pub"):
            shutil.copy(self.directory / f"client_key{suffix}", ssh / f"id_ed25519{suffix}")
        self._write_ssh_config()
        self.know()
        self.write_hosts()

    # ------------------------------------------------------------------ the server
    @property
    def stopped(self) -> bool:
        return self._sshd is None

    @property
    def sshd_pid(self) -> int:
        assert self._sshd is not None  # it was started
        return self._sshd.pid

    def start(self) -> None:
        program = sshd_program()
        if program is None:
            raise WorkerError("there is no sshd on this machine: install openssh-server")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it goes to lose its rights
        (self.directory / "sshd_config").write_text(self._sshd_config(), encoding="utf-8")
        with (self.directory / "sshd.log").open("ab") as log:
            self._sshd = subprocess.Popen(
                [program, "-D", "-e", "-f", str(self.directory / "sshd_config")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            if self._sshd.poll() is not None:
                break
            time.sleep(0.05)
        said = (self.directory / "sshd.log").read_text(encoding="utf-8", errors="replace")[-1000:]
        raise WorkerError(f"the sshd of the loopback host did not start: {said}")

    def stop(self) -> None:
        """The server and all its connections, at once. Trainings stay."""
        if self._sshd is not None:
            self.cut()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._sshd.pid, signal.SIGKILL)
            self._sshd.wait()
            self._sshd = None

    def cut(self) -> int:
        """Kill the processes that serve connections, as a network that goes away does. Returns how many."""
        if self._sshd is None:
            return 0
        killed = 0
        for process in psutil.Process(self._sshd.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ends by itself just now
                if "sshd" in process.name():
                    process.kill()
                    killed += 1
        return killed

    def new_host_key(self) -> None:
        """As after the host was set up anew, or when another machine answers."""
        self.make_key(self.directory / "host_key")

    @staticmethod
    def make_key(file: Path, passphrase: str = "") -> None:
        for old in (file, file.with_name(f"{file.name}.pub")):
            old.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(file)], check=True)

    def _sshd_config(self) -> str:
        own_home = "" if self._own_user else f"SetEnv HOME={self.home}\n"
        return (
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.directory}/host_key\n"
            f"AuthorizedKeysFile {self.directory}/authorized_keys\nPidFile {self.directory}/sshd.pid\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nMaxStartups 100:30:200\n"
            + (f"Subsystem sftp {self.sftp}\n" if self.sftp else "")
            + own_home
        )

    # ------------------------------------------------------------------ who connects
    @property
    def manyhands_home(self) -> Path:
        return self.client / "manyhands"

    def environment(self) -> dict[str, str]:
        """Of a program that connects."""
        return {"HOME": str(self.client), "MANYHANDS_HOME": str(self.manyhands_home), "SSH_AUTH_SOCK": ""}

    def know(self) -> None:
        """Its key, as ssh-keyscan would add it."""
        key = (self.directory / "host_key.pub").read_text(encoding="utf-8")
        known = self.client / ".ssh" / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {key}", encoding="utf-8")

    def write_hosts(self, *others: Mapping[str, Any], **fields: Any) -> None:
        """hosts.json: server1, and others by the same address."""
        entry = {"HostName": "server1", "WorkDir": str(self.home / "manyhands"), "Python": sys.executable}
        self.manyhands_home.mkdir(exist_ok=True)
        entries = [{**entry, **fields}, *({**entry, **other} for other in others)]
        (self.manyhands_home / "hosts.json").write_text(json.dumps(entries), encoding="utf-8")

    def _write_ssh_config(self) -> None:
        ssh = self.client / ".ssh"
        (ssh / "config").write_text(
            f"Host server1 server2 server3\n  HostName 127.0.0.1\n  Port {self.port}\n  User {self.user}\n"
            f"  IdentityFile {ssh}/id_ed25519\n  UserKnownHostsFile {ssh}/known_hosts\n",
            encoding="utf-8",
        )


@contextlib.contextmanager
def loopback_host(directory: Path, **settings: Any) -> Iterator[LoopbackHost]:
    host = LoopbackHost(directory, **settings)
    host.start()
    try:
        yield host
    finally:
        host.stop()
