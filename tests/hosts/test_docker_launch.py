"""`docker exec -it NAME` as people have it, detached: a stand-in enters a container and, like docker, refuses `-t`.

The container is bubblewrap's: another root of files, in which the host's home is another directory.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.hosts.check import check
from manyhands.hosts.hosts_file import host_named
from manyhands.hosts.record import Record
from manyhands.hosts.watching import stop
from manyhands.ui.bench.loopback_host import LoopbackHost

STAND_IN = """#!/bin/sh
# docker exec [-i] [-t] NAME COMMAND...
[ "$1" = exec ] || exit 125
shift
while [ "${1#-}" != "$1" ]; do
  case "$1" in *t*) [ -t 0 ] || { echo "the input device is not a TTY" >&2; exit 1; };; esac
  shift
done
[ "$1" = upbeat_fermi ] || { echo "Error: No such container: $1" >&2; exit 1; }
shift
exec bwrap --dev-bind / / --bind INSIDE OUTSIDE -- "$@"
"""


@pytest.fixture
def docker(host: LoopbackHost, place_of_both: Path) -> str:
    """A DockerLaunchCommand; what the container has at the host's home is in <home>/../inside."""
    if shutil.which("bwrap") is None:
        pytest.skip("no bwrap on this machine: install bubblewrap to test docker's part")
    inside = host.directory / "inside"
    inside.mkdir(exist_ok=True)
    program = place_of_both / "docker"
    program.write_text(STAND_IN.replace("INSIDE", str(inside)).replace("OUTSIDE", str(host.home)))
    program.chmod(0o755)
    refused = subprocess.run(
        [str(program), "exec", "-it", "upbeat_fermi", "true"], stdin=subprocess.DEVNULL, check=False
    )
    assert refused.returncode == 1
    return f"{program} exec -it upbeat_fermi"


def test_a_training_in_a_container(
    host: LoopbackHost,
    docker: str,
    manyhands: Callable[..., subprocess.CompletedProcess[str]],
    tiny: tuple[str, ...],
) -> None:
    host.write_hosts(DockerLaunchCommand=docker)
    words = ("--no-export", "exec.run_in_docker=true", "rounds.total=1", "run=contained")
    done = manyhands("train", "--host", "server1", *tiny, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (host.manyhands_home / "runs" / "contained" / "checkpoints" / "step-00000005").is_dir()
    assert (host.directory / "inside" / "manyhands" / "runs" / "contained" / "status.json").is_file()
    assert not (host.home / "manyhands" / "runs" / "contained").exists()
    assert manyhands("hosts", "attach", "contained").returncode == 0
    (row,) = json.loads(manyhands("hosts", "ls", "--format", "json").stdout)["runs"]
    assert row["state"] == "finished"


def test_a_host_that_cannot_do_it_otherwise_does_it_in_its_container(
    host: LoopbackHost, docker: str, begun: Callable[..., tuple[Record, list[str]]]
) -> None:
    python = host.directory / "inside" / "only-inside"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    needs_it = {"HostName": "server2", "Python": str(host.home / "only-inside")}
    host.write_hosts({**needs_it, "DockerLaunchCommand": docker}, WorkDir=str(host.home / "outside"))
    record, told = begun(host.manyhands_home / "runs" / "mixed", on=("server1", "server2"))
    asyncio.run(stop(record.parts[1], now=True))
    assert [part.docker for part in record.parts] == [False, True], "each host as it can"
    assert [text.partition(":")[0] for text in told if "container" in text] == [
        "server2 trains in its container"
    ]
    assert (host.home / "outside" / "runs" / "mixed" / "status.json").is_file()
    assert (host.directory / "inside" / "manyhands" / "runs" / "mixed" / "status.json").is_file()
    host.write_hosts(DockerLaunchCommand=docker, Python=str(host.home / "only-inside"))
    found = {c.what: c for c in asyncio.run(check(host_named("server1")))}
    assert (found["python"].state, found["docker"].state) == ("note", "ok")
    assert found["python"].found.endswith("it trains in its container")
    assert {"docker extras", "docker gpus"} <= found.keys()
    assert not any(c.state == "fault" for c in found.values()), found


def test_a_container_that_does_not_run(host: LoopbackHost, docker: str) -> None:
    host.write_hosts(DockerLaunchCommand=docker.replace("upbeat_fermi", "gone"))
    (fault,) = [c for c in asyncio.run(check(host_named("server1"))) if c.what == "docker"]
    assert fault.state == "fault"
    assert "No such container: gone" in fault.found
    assert fault.to_do == "start the container there, or mend DockerLaunchCommand"
