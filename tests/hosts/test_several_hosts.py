"""One training on two hosts, whose processes meet at the first; and several trainings on two hosts at once."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import DataError, ServerUnreachable, WorkerError
from manyhands.hosts import beginning
from manyhands.hosts.agent import Agent
from manyhands.hosts.beginning import Wish
from manyhands.hosts.fetch import Fetched
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.launch import Facts, Job
from manyhands.hosts.record import Part, Record
from manyhands.hosts.watching import Outcome, View
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
    started: Callable[..., Any],
    endless: tuple[str, ...],
    wait: Callable[..., Any],
    tmp_path: Path,
) -> None:
    words = [*endless, "run=both"]
    command = started("train", "--host=server1,server2", *words)
    here = two.manyhands_home / "runs" / "both"
    wait(
        lambda: '"step"' in (here / "events.jsonl").read_text() if (here / "events.jsonl").exists() else None,
        "a step",
    )
    second = two.home / tmp_path.name / "second" / "runs" / "both"
    status = json.loads((second / "status.json").read_text())
    os.kill(status["child"], signal.SIGKILL)
    begun = time.monotonic()
    code, output = command.ended()
    assert code == 137
    assert time.monotonic() - begun < 90  # the other one has 30 s to save
    assert "on cpu, 2 processes" in output
    assert re.search(
        r"server2 has ended: the other hosts are asked to save and end|server1 has ended", output
    )
    assert "the training on server2 was killed by SIGKILL" in output
    record = json.loads((here / "host.json").read_text())
    assert all(part["ending"]["state"] == "ended" for part in record["parts"])
    assert not (second / "checkpoints").exists() or not list((second / "checkpoints").iterdir())


def test_both_save_and_end_where_both_are_asked(
    two: LoopbackHost,
    started: Callable[..., Any],
    endless: tuple[str, ...],
    wait: Callable[..., Any],
    manyhands: Callable[..., Any],
) -> None:
    """The one that ends first does not have the other one asked again, which would leave at once."""
    command = started("train", "--host=server1,server2", *endless, "run=asked")
    here = two.manyhands_home / "runs" / "asked"
    events = here / "events.jsonl"
    wait(lambda: events.exists() and '"step"' in events.read_text(), "a step")
    assert manyhands("hosts", "stop", "asked").returncode == 0
    code, output = command.ended()
    assert code == 130, output
    record = json.loads((here / "host.json").read_text())
    assert [part["ending"]["exit_code"] for part in record["parts"]] == [130, 130], output
    assert (here / "checkpoints" / "latest").is_file()


def test_where_one_cannot_start_the_others_are_ended(
    two: LoopbackHost,
    begun: Callable[..., Any],
    wait: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = beginning.start

    async def only_first(there: Agent, facts: Facts, job: Job, directory: str) -> dict[str, Any]:
        if job.rank == 1:
            raise WorkerError("server2: the supervisor did not begin")
        return await start(there, facts, job, directory)

    monkeypatch.setattr(beginning, "start", only_first)
    here = two.manyhands_home / "runs" / "half"
    with pytest.raises(WorkerError, match="the supervisor did not begin"):
        begun(here, on=("server1", "server2"))
    status = two.home / tmp_path.name / "first" / "runs" / "half" / "status.json"
    wait(lambda: json.loads(status.read_text())["state"] == "ended", "the end on server1")
    assert not (here / "host.json").exists()  # so it can be begun again


def test_stop_asks_all_hosts(
    two: LoopbackHost, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    async def stop(part: Part, *, now: bool) -> dict[str, Any]:
        asked.append((part.host, now))
        if part.host == "server1":
            raise ServerUnreachable("server1: \x1b[2J no answer")
        return {"state": "running"}

    monkeypatch.setattr("manyhands.hosts.watching.stop", stop)
    parts = tuple(Part(host=name, directory="/r") for name in ("server1", "server2"))
    Record(run="both", parts=parts).keep_in(two.manyhands_home / "runs" / "both")
    assert run(["hosts", "stop", "both"]) == ServerUnreachable.exit_code
    assert asked == [("server1", False), ("server2", False)]
    output = capsys.readouterr()
    assert "both on server2 is asked to save and end" in output.out
    assert output.err == "error: server1: \\x1b[2J no answer\n"  # and nothing steers the terminal


def test_several_trainings_share_hosts_and_a_table(
    two: LoopbackHost,
    tiny: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each host takes the next when it is free. The trainings themselves are not: one lasts, one cannot begin."""
    on: dict[str, list[str]] = {"server1": [], "server2": []}

    async def begin(hosts: list[Host], wish: Wish, _view: View) -> Record:
        rate = wish.configuration.plan.local.optimizer.lr
        on[hosts[0].host_name].append(f"{rate:g}")
        if rate == 3:
            raise DataError("no such file there")
        return Record(run=wish.run, parts=(Part(host=hosts[0].host_name, directory="/"),))

    async def watch(_directory: Path, record: Record, view: View, *, replay: bool) -> Outcome:
        assert not replay
        await asyncio.sleep(0.6 if record.parts[0].host == "server1" else 0.1)
        view.event({"kind": "finished", "step": 5})
        failed = on["server2"][-1] == "4" and record.parts[0].host == "server2"
        ending = {"state": "ended", "exit_code": 9 if failed else 0, "tail": ["the disk is full"]}
        return Outcome(
            exit_code=ending["exit_code"], endings={record.parts[0].host: ending}, fetched=Fetched()
        )

    monkeypatch.setattr("manyhands.ui.host_sweep.begin", begin)
    monkeypatch.setattr("manyhands.ui.host_sweep.watch", watch)
    words = [*tiny, "optimizer.lr=1,2,3,4", "--logs", "json"]
    code = run(["train", "-m", "--host", "server1", "--host", "server2", *words])
    output = capsys.readouterr()
    assert on == {"server1": ["1"], "server2": ["2", "3", "4"]}
    events = [json.loads(line) for line in output.out.splitlines()]
    finished = sorted(event["run"] for event in events if event["kind"] == "finished")
    assert finished == ["server1 optimizer.lr=1", "server2 optimizer.lr=2", "server2 optimizer.lr=4"]
    assert any(
        e["run"] == "server2 optimizer.lr=3" and "no such file there" in e.get("text", "") for e in events
    )
    assert re.search(
        r"error: server2 optimizer\.lr=4: the training .* code 9\. Its last lines:\n  the disk", output.err
    )
    assert code == DataError.exit_code  # of the first that failed, in the order of the combinations
    assert two.user


@pytest.mark.parametrize(("dead", "code"), [(("server2",), 0), (("server1", "server2"), 6)])
def test_a_dead_host_gets_no_more(
    two: LoopbackHost,
    tiny: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    dead: tuple[str, ...],
    code: int,
) -> None:
    """The other one carries out its part as well, also what the dead one gives back when nothing else is left."""
    done: list[str] = []
    asked: list[str] = []

    async def begin(hosts: list[Host], wish: Wish, _view: View) -> Record:
        name = hosts[0].host_name
        asked.append(name)
        await asyncio.sleep(0.2 if name in dead else 0)
        if name in dead:
            raise ServerUnreachable(f"{name}: no route")
        done.append(f"{wish.configuration.plan.local.optimizer.lr:g}")
        return Record(run=wish.run, parts=(Part(host=name, directory="/"),))

    async def watch(_directory: Path, record: Record, _view: View, *, replay: bool) -> Outcome:
        assert not replay
        ending = {"state": "ended", "exit_code": 0}
        return Outcome(exit_code=0, endings={record.parts[0].host: ending}, fetched=Fetched())

    monkeypatch.setattr("manyhands.ui.host_sweep.begin", begin)
    monkeypatch.setattr("manyhands.ui.host_sweep.watch", watch)
    words = [*tiny, "optimizer.lr=1,2,3,4,5,6", "--logs", "console"]
    assert run(["train", "-m", "--host", "server1", "--host", "server2", *words]) == code
    output = capsys.readouterr()
    assert "server2: no route; nothing more is begun there" in output.out
    assert asked.count("server2") == 1
    assert sorted(done) == ([] if code else ["1", "2", "3", "4", "5", "6"])
    assert ("error: no host is left for 6 of the trainings" in output.err) == bool(code)
    assert two.user


@pytest.mark.parametrize("host_dies", [False, True])
def test_stop_while_one_is_being_begun(
    two: LoopbackHost,
    tiny: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    host_dies: bool,
) -> None:
    """It is stopped as soon as it has begun, and nothing is begun after it, also where its host has died over it."""
    begun: list[str] = []
    stopped: list[str] = []
    beginning_now, has_stopped = asyncio.Event(), asyncio.Event()

    async def begin(hosts: list[Host], wish: Wish, _view: View) -> Record:
        begun.append(hosts[0].host_name)
        if hosts[0].host_name == "server2":
            beginning_now.set()
            await has_stopped.wait()
            if host_dies:
                raise ServerUnreachable("server2: no route")
        return Record(run=wish.run, parts=(Part(host=hosts[0].host_name, directory="/"),))

    async def stop(part: Part, *, now: bool) -> dict[str, Any]:
        assert not now
        stopped.append(part.host)
        return {"state": "running", "phase": "training"}

    async def watch(_directory: Path, record: Record, _view: View, *, replay: bool) -> Outcome:
        assert not replay
        name = record.parts[0].host
        while name not in stopped:
            await asyncio.sleep(0.01)
        return Outcome(exit_code=130, endings={name: {"state": "ended", "exit_code": 130}}, fetched=Fetched())

    async def attended(watching: asyncio.Future[Any], _screen: object, on_stop: Callable[[], Any]) -> None:
        await beginning_now.wait()
        await on_stop()
        has_stopped.set()
        await watching

    for name, by in (("begin", begin), ("watch", watch), ("attended", attended)):
        monkeypatch.setattr(f"manyhands.ui.host_sweep.{name}", by)
    monkeypatch.setattr("manyhands.ui.attending.stop", stop)
    words = [*tiny, "optimizer.lr=1,2,3,4", "--logs", "console"]
    assert run(["train", "-m", "--host", "server1", "--host", "server2", *words]) == 130
    assert sorted(begun) == ["server1", "server2"]
    assert stopped == (["server1"] if host_dies else ["server1", "server2"])
    assert "not begun: optimizer.lr=3; optimizer.lr=4" in capsys.readouterr().out
    assert two.user


def test_what_does_not_go_together(
    two: LoopbackHost, tiny: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--host", "server1,server2", *tiny, "parallel.strategy=fsdp"]) == 3
    assert "saved by all of them into one directory" in capsys.readouterr().err
    assert run(["train", "--host", "server1,server1", *tiny]) == 3
    assert "named twice" in capsys.readouterr().err
    assert run(["train", "--host", "server1", *tiny, "exec.run_in_docker=true"]) == 3
    assert "server1 has no DockerLaunchCommand in the hosts' file" in capsys.readouterr().err
    assert run(["train", "--host", "server1", *tiny, "rank=0", "world_size=2"]) == 2
    assert "--host=a,b does that itself" in capsys.readouterr().err
    same = ["optimizer.lr=1,2", "run=same"]
    assert run(["train", "-m", "--host", "server1", *tiny, *same]) == 2
    assert "the trainings would share " in capsys.readouterr().err
    assert run(["train", "--host", "server1", *tiny, "--resume", "nowhere"]) == 2
    assert "no run of that name in" in capsys.readouterr().err
    assert run(["train", *tiny, "exec.run_in_docker=true"]) == 2
    assert "give --host" in capsys.readouterr().err
    assert run(["train", *tiny, "--no-export"]) == 2
    assert run(["train", *tiny, "nodes=2"]) == 3
    assert "nodes and node_rank belong together" in capsys.readouterr().err
    assert not (two.manyhands_home / "runs").exists()
