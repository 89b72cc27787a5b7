"""What `hosts check` says of a host."""

from __future__ import annotations

import asyncio
import json

import pytest

from manyhands.hosts.check import Check, check
from manyhands.hosts.hosts_file import host_named
from manyhands.ui.bench.loopback_host import LoopbackHost
from manyhands.ui.main import run


def checked(host: LoopbackHost, **entry: object) -> dict[str, Check]:
    host.write_hosts(**entry)
    return {c.what: c for c in asyncio.run(check(host_named("server1")))}


def test_a_host_that_can_be_trained_on(host: LoopbackHost, capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(host)
    assert list(found) == [
        "connection",
        "python",
        "manyhands",
        "extras",
        "gpus",
        "disk",
        "clock",
        "mount",
        "docker",
    ]
    assert {c.state for c in found.values()} <= {"ok", "note"}
    assert found["mount"].found == "none: results come back over the connection"
    assert "no DockerLaunchCommand" in found["docker"].found
    assert run(["hosts", "check", "--format", "json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 9


def test_a_mount_is_found_out_by_trying(host: LoopbackHost) -> None:
    assert checked(host, PathToOutputFromHost="/nowhere")["mount"].found == "/nowhere is not there"
    other = checked(host, PathToOutputFromHost="/tmp")["mount"]
    assert (other.state, other.found) == ("note", "/tmp is not MANYHANDS_HOME of this machine")
    same = checked(host, PathToOutputFromHost=str(host.manyhands_home))["mount"]
    assert (same.state, "nothing has to be sent back" in same.found) == ("ok", True)
    assert not list(host.manyhands_home.glob(".seen-*"))


def test_faults_say_what_to_do(host: LoopbackHost, capsys: pytest.CaptureFixture[str]) -> None:
    gpus = checked(host, Devices="3")["gpus"]
    assert (gpus.state, "has no GPU 3" in gpus.to_do) == ("fault", True)
    assert checked(host, WorkDir="/proc/x")["disk"].state == "fault"
    unreachable = checked(host, Port=1)
    assert list(unreachable) == ["connection"]
    assert "cannot be reached" in unreachable["connection"].found
    assert run(["hosts", "check", "server1"]) == 12
    assert "whether `ssh -p 1 server1` gets there" in capsys.readouterr().out
