"""Connections by a real sshd: what ssh is set up with holds, and each way of not getting in has its own words."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import IdentityError, ManyhandsError, PlanError, Refused, ServerUnreachable, WorkerError
from manyhands.hosts.agent import agent, command_for
from manyhands.hosts.connection import connected
from manyhands.hosts.hosts_file import Host, host_named
from manyhands.ui.bench.loopback_host import LoopbackHost


def probed(host: Host, **settings: Any) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        async with connected(host) as connection, agent(connection, host, **settings) as there:
            return await there.ask("probe", work=host.work_dir)

    return asyncio.run(ask())


def refusal(kind: type[ManyhandsError], name: str = "server1") -> str:
    with pytest.raises(kind) as told:
        probed(host_named(name))
    return str(told.value)


def test_ssh_is_used_as_it_is_set_up(host: LoopbackHost) -> None:
    facts = probed(host_named("server1"))  # port, user, key and known_hosts are those of ~/.ssh/config
    assert facts["work"] == str(host.home / "manyhands")
    assert facts["manyhands"] is not None


def test_what_the_login_shell_prints_is_no_answer(host: LoopbackHost) -> None:
    banner = host.home / ".bashrc"
    banner.write_text("echo welcome to this machine\n", encoding="utf-8")
    try:
        assert probed(host_named("server1"))["python"][0] == 3
    finally:
        banner.unlink()


def test_a_host_that_was_never_seen_is_refused_with_the_command_that_adds_it(host: LoopbackHost) -> None:
    known = host.client / ".ssh" / "known_hosts"
    before = known.read_text()
    known.unlink()
    text = refusal(Refused)
    fingerprint = subprocess.run(
        ["ssh-keygen", "-lf", str(host.directory / "host_key.pub")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[1]
    assert fingerprint in text
    command = re.search(r"add it: (ssh-keyscan .*)$", text)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, capture_output=True)
    assert before.split()[2] in known.read_text()
    assert probed(host_named("server1"))["python"]


@pytest.mark.parametrize("setting", ["none", "/dev/null"])
def test_no_key_is_taken_unseen_whatever_ssh_is_set_up_with(host: LoopbackHost, setting: str) -> None:
    config, known = host.client / ".ssh" / "config", host.client / ".ssh" / "known_hosts"
    lines = [line for line in config.read_text().splitlines() if "KnownHosts" not in line]
    config.write_text("\n".join([f"UserKnownHostsFile {setting}", *lines, ""]))
    assert probed(host_named("server1"))["python"]  # ssh's own file has it
    known.write_text("")
    assert f">> {known}" in refusal(Refused)


def test_a_changed_host_key_is_told_as_such(host: LoopbackHost) -> None:
    key = (host.directory / "host_key.pub").read_text()
    other = host.directory / "other_key"
    host.make_key(other)
    known = host.client / ".ssh" / "known_hosts"
    known.write_text(
        known.read_text().replace(key.split()[1], other.with_suffix(".pub").read_text().split()[1])
    )
    text = refusal(Refused)
    assert "HAS CHANGED" in text
    command = re.search(r"only then: (ssh-keygen -R .* && ssh-keyscan .*)$", text)
    assert command is not None
    subprocess.run(command[1], shell=True, check=True, capture_output=True)
    assert probed(host_named("server1"))["python"]


def test_a_wrong_key_is_told_and_no_password_is_asked_for(host: LoopbackHost) -> None:
    host.make_key(host.client / ".ssh" / "id_ed25519")
    assert re.search(r"server1 does not let \S+ in .*ssh-copy-id -i .*passwords are never", refusal(Refused))
    host.write_hosts(IdentityFile=str(host.client / "nowhere"))
    assert "nowhere does not exist: make one with `ssh-keygen" in refusal(IdentityError)


def test_a_key_with_a_passphrase_is_for_the_agent(
    host: LoopbackHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = host.client / ".ssh" / "locked"
    host.make_key(locked, passphrase="secret")
    host.write_hosts(IdentityFile=str(locked))
    assert f"ssh-add {locked}" in refusal(Refused)
    socket, authorized = host.client / "agent", host.directory / "authorized_keys"
    let_in = authorized.read_text()
    program = subprocess.Popen(["ssh-agent", "-D", "-a", str(socket)], stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert program.poll() is None
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", str(host.directory / "client_key")], check=True)
        host.write_hosts()
        host.make_key(host.client / ".ssh" / "id_ed25519")  # only the agent has the right one
        assert probed(host_named("server1"))["python"]
        subprocess.run(["ssh-add", "-q", "-D"], check=True)
        host.write_hosts(IdentityFile=str(locked))
        assert f"ssh-add {locked}" in refusal(Refused)
        authorized.write_text(locked.with_suffix(".pub").read_text())
        asks = host.client / "asks"
        asks.write_text("#!/bin/sh\necho secret\n")
        asks.chmod(0o700)
        by_hand = {**os.environ, "SSH_ASKPASS": str(asks), "SSH_ASKPASS_REQUIRE": "force"}
        subprocess.run(["ssh-add", "-q", str(locked)], check=True, env=by_hand)
        assert probed(host_named("server1"))["python"]
    finally:
        authorized.write_text(let_in)
        program.kill()
        program.wait()


def test_behind_another_host_or_name_the_key_is_added_by_ssh(host: LoopbackHost) -> None:
    known = host.client / ".ssh" / "known_hosts"
    known.write_text("")
    config = host.client / ".ssh" / "config"
    config.write_text(config.read_text() + "\n    HostKeyAlias somebody\n")
    assert re.search(r"add it: ssh -o StrictHostKeyChecking=ask \S*server1 true$", refusal(Refused))


def test_nobody_there(host: LoopbackHost) -> None:
    host.write_hosts(Port=1)
    assert re.search(
        r"server1 cannot be reached at 127\.0\.0\.1:1: .*whether `ssh -p 1 server1`",
        refusal(ServerUnreachable),
    )


def test_no_python(host: LoopbackHost) -> None:
    host.write_hosts(Python="/nowhere/python")
    assert "server1 has no Python at /nowhere/python: install Python 3.11" in refusal(WorkerError)


@pytest.mark.usefixtures("host")
def test_what_is_written_to_a_command_that_has_ended_is_no_fault() -> None:
    """It may end before its program is sent, as where there is no Python; how it ended is what counts."""

    class Told:
        def __init__(self) -> None:
            self.ended = asyncio.Event()

        def received(self, data: bytes) -> None: ...
        def complained(self, data: bytes) -> None: ...
        def may_write(self, may: bool) -> None: ...
        def exited(self, code: int) -> None: ...
        def closed(self, reason: str | None) -> None:
            self.reason = reason
            self.ended.set()

    async def written() -> None:
        told = Told()
        async with connected(host_named("server1")) as connection:
            channel = await connection.open("exit 3", told)
            await asyncio.wait_for(told.ended.wait(), 10)
            channel.write(b"a program")

    asyncio.run(written())


def test_a_directory_named_by_its_tilde(host: LoopbackHost) -> None:
    (host.home / "bin").mkdir(exist_ok=True)
    link = host.home / "bin" / "python"
    link.unlink(missing_ok=True)
    link.symlink_to(sys.executable)
    host.write_hosts(Python="~/bin/python", WorkDir="~/a place")
    facts = probed(host_named("server1"))
    assert facts["executable"] == str(link)
    assert facts["work"] == str(host.home / "a place")


def test_this_machine_needs_no_ssh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "Desk.example.org")
    facts = probed(Host(host_name="desk", work_dir=str(tmp_path)))
    assert facts["work"] == str(tmp_path)


def test_wsl_goes_through_wsl_exe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host = Host(host_name="WSL", user_name="user2", work_dir=str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(PlanError, match=r"no wsl\.exe \(it runs linux\): leave --host out"):
        probed(host)
    program = tmp_path / "wsl.exe"
    program.write_text(
        '#!/bin/sh\ntouch "$(dirname "$0")/entered"\n[ "$1 $2" = "--user user2" ] || exit 8\nshift 2\n'
        'case "$1" in --exec) shift; exec "$@" ;; --) shift; exec sh -c "$*" ;; esac\nexit 9\n'
    )
    program.chmod(0o755)
    assert probed(host)["work"] == str(tmp_path)
    assert (tmp_path / "entered").exists()


def test_a_connection_that_is_cut_is_told_at_once(host: LoopbackHost) -> None:
    async def cut() -> None:
        server = host_named("server1")
        async with connected(server) as connection, agent(connection, server) as there:
            assert host.cut() > 0
            with pytest.raises(ServerUnreachable, match="the connection was lost"):
                await asyncio.wait_for(there.ask("probe", work="/"), 10)

    asyncio.run(cut())


def test_the_command_for_a_container_enters_it() -> None:
    host = Host(host_name="a", docker_launch_command="docker exec -it NAME")
    assert command_for(host, docker=True).startswith("docker exec -i NAME sh -c ")
    assert command_for(host).startswith("sh -c ")
