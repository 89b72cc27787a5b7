"""`hosts setup` for real: a wheel of what runs here, an environment on the host, without a network."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands import __version__
from manyhands.errors import StorageError, WorkerError
from manyhands.hosts import connection
from manyhands.hosts import setup as module
from manyhands.hosts.agent import agent
from manyhands.hosts.check import check
from manyhands.hosts.connection import connected
from manyhands.hosts.hosts_file import host_named
from manyhands.hosts.launch import send_file
from manyhands.hosts.setup import own_wheel, setup
from manyhands.ui.bench.loopback_host import LoopbackHost


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    with zipfile.ZipFile(own_wheel(tmp_path)) as wheel:
        names = set(wheel.namelist())
        record = {
            line.split(",")[0]
            for line in wheel.read(f"manyhands-{__version__}.dist-info/RECORD").decode().splitlines()
        }
    assert record == names
    assert {"manyhands/hosts/on_host/serve.py", "manyhands/conf/train.yaml"} <= names
    assert not any("__pycache__" in name for name in names)


def test_an_environment_is_made_and_used(
    host: LoopbackHost, manyhands: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = manyhands(
        "hosts", "setup", "server1", "--system-packages", "--no-dependencies", env={"PIP_NO_INDEX": "1"}
    )
    assert done.returncode == 0, done.stderr
    python = host.home / "manyhands" / "venv" / "bin" / "python"
    assert f"server1 has manyhands {__version__} at {python}" in done.stdout
    assert f'its entry names "Python": {sys.executable}' in done.stderr
    where = subprocess.run(
        [python, "-c", "import manyhands; print(manyhands.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(python.parent.parent))
    host.write_hosts(Python=None)  # now it is found by itself
    found = {c.what: c for c in asyncio.run(check(host_named("server1")))}
    assert found["python"].found.endswith(str(python))
    bare = "and torch is missing" in found["manyhands"].found  # what the system has is not ours to say
    assert found["manyhands"].state == ("fault" if bare else "ok")
    assert bool(re.search(r"before these are installed too: .*\btorch\b", done.stderr)) == bare


@pytest.mark.parametrize(
    ("sftp", "by_sftp"), [("internal-sftp", True), (None, False), ("/bin/sleep 1000", False)]
)
def test_the_wheel_comes_by_sftp_and_where_there_is_none_by_the_agent(
    host: LoopbackHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sftp: str | None, by_sftp: bool
) -> None:
    wheel, place = own_wheel(tmp_path), host.home / f"sent by {sftp}".replace("/", "-") / "a wheel"
    monkeypatch.setattr(connection, "SILENCE_S", 2.0)
    monkeypatch.setattr(host, "sftp", sftp)
    host.stop()
    host.start()

    async def send() -> tuple[int, int]:
        to = host_named("server1")
        async with connected(to) as reached, agent(reached, to, python=sys.executable) as there:
            return (
                await send_file(there, wheel, str(place), sftp=reached),
                await send_file(there, wheel, str(place), sftp=reached),
            )

    try:
        assert asyncio.run(send()) == (0 if by_sftp else wheel.stat().st_size, 0)
        assert [file.name for file in place.parent.iterdir()] == ["a wheel"]
        assert place.read_bytes() == wheel.read_bytes()
    finally:
        host.stop()  # the next test starts it, as it was


@pytest.mark.usefixtures("host")
def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEEDED_BYTES", 1 << 60)
    wheel = own_wheel(tmp_path)
    with pytest.raises(StorageError, match=r"GiB are free at .*, and torch needs about"):
        asyncio.run(setup(host_named("server1"), wheel, tell=lambda _text: None))


def test_what_pip_says_is_shown(host: LoopbackHost, tmp_path: Path) -> None:
    broken = tmp_path / f"manyhands-{__version__}-py3-none-any.whl"
    broken.write_bytes(b"no wheel")
    host.write_hosts(WorkDir=str(host.home / "other"))
    with pytest.raises(WorkerError, match=r"server1: pip ended with exit code 1:\n(.*\n)*.*(?i:wheel)"):
        asyncio.run(setup(host_named("server1"), broken, dependencies=False, tell=lambda _text: None))
