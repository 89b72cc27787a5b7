"""One training on two hosts, whose processes meet at the first; and several trainings on two hosts at once."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.ui.bench.loopback_host import LoopbackHost
from manyhands.ui.main import run


@pytest.fixture
def two(host: LoopbackHost, tmp_path: Path) -> LoopbackHost:
    """server1 and server2: the same machine, with directories of their own."""
    places = {name: str(host.home / tmp_path.name / name) for name in ("first", "second")}
    host.write_hosts({"HostName": "server2", "WorkDir": places["second"]}, WorkDir=places["first"])
    return host


def test_one_training_on_two_hosts_and_one_of_them_dies(
    two: LoopbackHost,
    started: Callable[..., subprocess.Popen[str]],
    tiny: tuple[str, ...],
    wait: Callable[..., Any],
    tmp_path: Path,
) -> None:
    words = [*tiny, "rounds.total=100000", "run=both", "--no-export"]
    process = started("train", "--host=server1,server2", *words)
    here = two.manyhands_home / "runs" / "both"
    wait(
        lambda: "step-" in (here / "events.jsonl").read_text() if (here / "events.jsonl").exists() else None,
        "a checkpoint",
    )
    second = two.home / tmp_path.name / "second" / "runs" / "both-1"
    status = json.loads((second / "status.json").read_text())
    os.kill(status["child"], signal.SIGKILL)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 137
    assert time.monotonic() - begun < 40
    assert "on cpu, 2 processes" in output
    assert re.search(
        r"server2 has ended: the other hosts are asked to save and end|server1 has ended", output
    )
    assert "the training on server2 was killed by SIGKILL" in output
    record = json.loads((here / "host.json").read_text())
    assert all(part["ending"]["state"] == "ended" for part in record["parts"])
    assert not (second / "checkpoints").exists() or not list((second / "checkpoints").iterdir())


def test_several_trainings_share_hosts_and_a_table(
    two: LoopbackHost, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*tiny, "rounds.total=1", "optimizer.lr=1e-3,1e-2,1e30", "--no-export", "--logs", "json"]
    code = run(["train", "-m", "--host", "server1", "--host", "server2", *words])
    output = capsys.readouterr()
    events = [json.loads(line) for line in output.out.splitlines()]
    finished = {event["run"] for event in events if event["kind"] == "finished"}
    assert {name.partition(" ")[2] for name in finished} == {"optimizer.lr=0.001", "optimizer.lr=0.01"}
    assert {event["run"].partition(" ")[0] for event in events} == {"server1", "server2"}
    assert code == 12
    assert re.search(
        r"error: server\d optimizer\.lr=1e\+30: the training .* ended with exit code 12", output.err
    )
    assert len(list((two.manyhands_home / "runs").iterdir())) == 3


def test_what_does_not_go_together(
    two: LoopbackHost, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--host", "server1,server2", *tiny, "parallel.strategy=fsdp"]) == 3
    assert "saved by all of them into one directory" in capsys.readouterr().err
    assert run(["train", "--host", "server1,server1", *tiny]) == 3
    assert "named twice" in capsys.readouterr().err
    assert run(["train", *tiny, "exec.run_in_docker=true"]) == 2
    assert "give --host" in capsys.readouterr().err
    assert run(["train", *tiny, "--no-export"]) == 2
    assert run(["train", *tiny, "nodes=2"]) == 3
    assert "nodes and node_rank belong together" in capsys.readouterr().err
    assert not (two.manyhands_home / "runs").exists()
