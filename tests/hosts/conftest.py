"""A real sshd on a loopback port is the host: its own keys, home, and (where this is root) its own Unix user."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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
def host(sshd: LoopbackHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHost:
    """The same host, as a person sees it who connects for the first time: a home with ~/.ssh and no trainings."""
    sshd.client = tmp_path / "client"
    sshd.set_up_client()
    for name, value in sshd.environment().items():
        monkeypatch.setenv(name, value)
    if sshd.stopped:
        sshd.start()
    return sshd


@pytest.fixture
def manyhands(host: LoopbackHost) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command as somebody who has hosts."""

    def run(*arguments: str, timeout: float = 120, **settings: Any) -> subprocess.CompletedProcess[str]:
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


@pytest.fixture
def started(host: LoopbackHost) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the installed command, with its output in a pipe; it is ended with the test."""
    processes = []

    def start(*arguments: str, **settings: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("manyhands")), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **host.environment(), "COLUMNS": "110"},
            **settings,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def until(ready: Callable[[], Any], what: str, *, within_s: float = 60) -> Any:
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
