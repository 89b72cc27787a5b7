"""A real sshd on a loopback port is the host: its own keys, home, and (where this is root) its own Unix user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from manyhands.engine.configuration import configure
from manyhands.hosts.beginning import Wish, begin
from manyhands.hosts.hosts_file import host_named
from manyhands.hosts.on_host import processes
from manyhands.hosts.record import Record
from manyhands.hosts.watching import stop
from manyhands.ui.bench.loopback_host import LoopbackHost, loopback_host, sshd_program

USER = "manyhands-test"
TINY = (
    "task=tabular", "task.table.generated_rows=200", "local.steps=5", "local.batch_size=8",
    "rounds.snapshot_every=1", "evaluation.max_batches=2", "logging.every_steps=5", "exec.threads=1",
)  # fmt: skip


@pytest.fixture(scope="session")
def unix_user() -> Iterator[tuple[str, Path] | None]:
    """A user with a home of its own. None where this is not root, or another user cannot run this Python: then the
    host is the same user with another home."""
    if os.geteuid() != 0 or shutil.which("useradd") is None:
        yield None
        return
    home = Path(tempfile.mkdtemp(prefix="manyhands-home-"))
    name = f"{USER}-{os.getpid()}"
    subprocess.run(["useradd", "-M", "-d", str(home), "-s", "/bin/bash", "-p", "*", name], check=True)
    try:
        user = pwd.getpwnam(name)
        os.chown(home, user.pw_uid, user.pw_gid)
        yield (name, home) if _can_run_python(user) else None
    finally:
        subprocess.run(["pkill", "-KILL", "-u", name], check=False)
        subprocess.run(["userdel", name], check=True, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


def _can_run_python(user: pwd.struct_passwd) -> bool:
    try:
        command = [sys.executable, "-c", "import manyhands"]
        return (
            subprocess.run(command, user=user.pw_uid, cwd="/", capture_output=True, check=False).returncode
            == 0
        )
    except OSError:
        return False


@pytest.fixture(scope="session")
def sshd(unix_user: tuple[str, Path] | None) -> Iterator[LoopbackHost]:
    """The host of most tests."""
    if sshd_program() is None:
        pytest.skip("no sshd on this machine: install openssh-server to test other hosts")
    directory = Path(tempfile.mkdtemp(prefix="manyhands-sshd-"))
    directory.chmod(0o755)
    settings: dict[str, Any] = {} if unix_user is None else {"user": unix_user[0], "home": unix_user[1]}
    try:
        with loopback_host(directory, **settings) as host:
            yield host
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def host(sshd: LoopbackHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHost]:
    """The same host, as a person sees it who connects for the first time: a home with ~/.ssh and no trainings.

    What a test writes, the host's user may read and change, also where it is another one: what lies there stands for
    its own files, and `place_of_both` for a mount. What still runs there after a test is ended.
    """
    before = os.umask(0)
    sshd.client = sshd.directory / tmp_path.name / "client"
    sshd.set_up_client()
    for name, value in sshd.environment().items():
        monkeypatch.setenv(name, value)
    if sshd.stopped:
        sshd.start()
    yield sshd
    for file in sshd.home.rglob("status.json"):
        with contextlib.suppress(ValueError, OSError, KeyError):
            status = json.loads(file.read_text())
            for name in ("pid", "child"):
                if processes.begun(status[name]) == status[f"{name}_start"]:
                    os.kill(status[name], signal.SIGKILL)
    os.umask(before)


@pytest.fixture
def place_of_both(host: LoopbackHost) -> Path:
    """A directory that the host's user can reach too."""
    return host.client.parent


@pytest.fixture
def manyhands(host: LoopbackHost) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command as somebody who has hosts."""

    def run(*arguments: str, timeout: float = 240, **settings: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("manyhands")), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **host.environment(), "COLUMNS": "110", **settings.pop("env", {})},
            check=False,
            **settings,
        )

    return run


class Started:
    """The installed command as a process of its own, whose output goes to a file."""

    def __init__(self, arguments: tuple[str, ...], environment: dict[str, str], output: Path) -> None:
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).with_name("manyhands")), *arguments],
                stdout=file,
                stderr=file,
                env={**os.environ, **environment, "COLUMNS": "110"},
            )

    def ended(self, within_s: float = 120) -> tuple[int, str]:
        """Exit code and output."""
        return self.process.wait(within_s), self._output.read_text(encoding="utf-8")


@pytest.fixture
def started(host: LoopbackHost, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    """Start the installed command; it is ended with the test."""
    running: list[Started] = []

    def start(*arguments: str) -> Started:
        running.append(Started(arguments, host.environment(), tmp_path / f"output-{len(running)}"))
        return running[-1]

    yield start
    for command in running:
        with contextlib.suppress(ProcessLookupError):
            command.process.send_signal(signal.SIGKILL)
        command.process.wait()


class Told:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def event(self, event: dict[str, Any]) -> None: ...

    def line(self, host: str, text: str) -> None: ...

    def tell(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def begun(host: LoopbackHost) -> Callable[..., tuple[Record, list[str]]]:
    """Begin a training, on server1 if no other is named, and end it at once; its record, and what was told."""
    assert host.sshd_pid

    def begun(
        directory: Path,
        *words: str,
        plan_file: Path | None = None,
        on: Sequence[str] = ("server1",),
        **settings: Any,
    ) -> tuple[Record, list[str]]:
        told = Told()
        configuration = configure(words, plan_file=plan_file) if plan_file else configure([*TINY[:4], *words])
        wish = Wish(configuration=configuration, run=directory.name, directory=directory, **settings)

        async def go() -> Record:
            record = await begin([host_named(name) for name in on], wish, told)
            await stop(record.parts[0], now=True)
            return record

        return asyncio.run(go()), told.texts

    return begun


def until(ready: Callable[[], Any], what: str, *, within_s: float = 150) -> Any:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if found := ready():
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited {within_s} s for {what}")


@pytest.fixture(scope="session")
def wait() -> Callable[..., Any]:
    return until


@pytest.fixture(scope="session")
def endless(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """A training that ends when it is asked to, and keeps the machine free for others meanwhile."""
    return (
        *tiny,
        "rounds.total=100000",
        "rounds.snapshot_every=100000",
        "logging.every_steps=100",
        "--no-export",
    )


@pytest.fixture(scope="session")
def tiny() -> tuple[str, ...]:
    """A training of five steps a round."""
    return TINY


@pytest.fixture
def tmpfs() -> Iterator[Callable[[Path], Path]]:
    """Mount a disk of one MiB at a place."""
    mounted = []

    def mount(place: Path) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip("a disk of one MiB cannot be mounted here (it takes root)")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)
