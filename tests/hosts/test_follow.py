"""Following what runs on a real host, while everything that can be killed or cut is. What runs is a small program."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from manyhands.errors import ProtocolError, ServerUnreachable, StorageError, WorkerError
from manyhands.hosts.agent import AGENT, SUPERVISOR, Agent, Answer, program, reached
from manyhands.hosts.follow import EVENTS, LOG, Copy, Follower
from manyhands.hosts.hosts_file import Host, host_named
from manyhands.hosts.on_host.processes import begun
from manyhands.hosts.patience import Patience
from manyhands.hosts.watching import exit_code_of, stop_in_words, words_of
from manyhands.ui.bench.loopback_host import LoopbackHost

TELLING = """
import json, os, sys, time
count, pause = int(sys.argv[1]), float(sys.argv[2])
for step in range(count):
    with open("events.jsonl", "a") as file:
        file.write(json.dumps({"kind": "step", "step": step, "text": "é" * 50}) + "\\n")
    print(f"line {step}", flush=True)
    time.sleep(pause)
"""


class Run:
    """A run's directory on the host with a program under a supervisor."""

    def __init__(self, host: LoopbackHost, directory: Path) -> None:
        self.host, self.directory = host, directory

    def start(self, *command: str, **job: Any) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            async with reached(host_named("server1")) as there:
                (answer := await there.ask(
                    "start", run=str(self.directory), supervisor=program(SUPERVISOR), job={"command": command, **job}
                ))  # fmt: skip
                status: dict[str, Any] = answer["status"]
                return status

        return asyncio.run(ask())

    def tell(self, count: int, pause_s: float, after: str = "", **job: Any) -> dict[str, Any]:
        return self.start("/usr/bin/env", "python3", "-c", TELLING + after, str(count), str(pause_s), **job)

    def end(self) -> None:
        """Whatever still runs."""
        with contextlib.suppress(OSError, KeyError):
            status = json.loads((self.directory / "status.json").read_text())
            for pid in (status["pid"], status["child"]):
                if begun(pid) is not None:
                    os.kill(pid, signal.SIGKILL)
            while begun(status["child"]) is not None:
                time.sleep(0.02)

    def follower(self, told: list[str], events: list[dict[str, Any]], copy: Copy | None = None) -> Follower:
        return Follower(
            host_named("server1"),
            str(self.directory),
            events=copy or Copy(None),
            on_event=events.append,
            tell=told.append,
        )

    def follow(self) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        """The ending, the events, and what was told of the connection."""
        told: list[str] = []
        events: list[dict[str, Any]] = []
        return asyncio.run(asyncio.wait_for(self.follower(told, events).until_its_end(), 60)), events, told


@pytest.fixture
def run(host: LoopbackHost, tmp_path: Path) -> Iterator[Run]:
    found = Run(host, host.home / "runs" / tmp_path.name)
    yield found
    found.host.stop()
    found.host.start()
    found.end()
    subprocess.run(["rm", "-rf", str(found.directory)], check=True)


def steps(events: list[dict[str, Any]]) -> list[int]:
    return [event["step"] for event in events]


def test_every_event_and_every_line_comes_and_the_exit_code_is_the_programs(run: Run) -> None:
    run.tell(20, 0.01, "\nprint('the end'); sys.exit(7)")
    ending, events, told = run.follow()
    assert steps(events) == list(range(20))
    assert exit_code_of(ending) == 7
    assert ending["tail"][-2:] == ["line 19", "the end"]
    assert told == []
    words = words_of("server1", ending)
    assert words.startswith("the training on server1 ended with exit code 7. Its last lines:\n  line 11\n")
    assert words.endswith("line 19\n  the end")


def test_it_goes_on_without_anybody_and_what_follows_it(run: Run) -> None:
    status = run.tell(10, 0.02, export=["/bin/sh", "-c", "echo exported; touch after"])
    assert status["state"] == "running"
    run.host.cut()
    end = time.monotonic() + 20
    while not (run.directory / "after").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    ending, events, _ = run.follow()
    assert steps(events) == list(range(10))
    assert (ending["state"], ending["exit_code"]) == ("ended", 0)
    assert "exported" in (run.directory / LOG).read_text()


@pytest.mark.parametrize(("code", "exported"), [(130, True), (9, False)])
def test_one_that_was_asked_to_end_gets_its_last_export_one_that_failed_does_not(
    run: Run, code: int, exported: bool
) -> None:
    run.tell(3, 0.02, f"\nsys.exit({code})", export=["/bin/sh", "-c", "echo exported; touch after"])
    ending, _, _ = run.follow()
    assert (ending["state"], ending["exit_code"]) == ("ended", code)
    assert (run.directory / "after").exists() == exported
    assert ending["tail"] == ["line 0", "line 1", "line 2"]


def test_checkpoints_are_exported_while_it_goes_on(run: Run) -> None:
    """One export at a time, for checkpoints that come after the start; the status tells of each that has ended."""
    checkpoints = run.directory / "checkpoints"
    (checkpoints / "step-00000001").mkdir(parents=True)
    script = (
        "seen=$(ls checkpoints); mkdir running || echo two at once >> made; echo $seen >> made; "
        "sleep 3; rmdir running"
    )
    run.tell(300, 0.1, export=["/bin/sh", "-c", script])

    def status() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run.directory / "status.json").read_text())
        return found

    def until(ready: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not ready():
            assert time.monotonic() < end
            time.sleep(0.05)

    time.sleep(2.5)  # the first was there before
    (checkpoints / ".step-00000010.partial-7").mkdir()
    (checkpoints / "step-00000010").mkdir()
    until((run.directory / "running").exists)
    (checkpoints / "step-00000020").mkdir()
    until(lambda: status().get("exports", 0) == 2)
    made = (run.directory / "made").read_text().splitlines()
    assert made == ["step-00000001 step-00000010", "step-00000001 step-00000010 step-00000020"]
    assert (status()["state"], status()["phase"]) == ("running", "training")


def test_an_export_beside_it_does_not_outlive_a_training(run: Run) -> None:
    """Nor does the end wait for one that hangs."""
    beside = "[ -e ended ] && exit; echo $$ > exporter; exec sleep 600"
    after = "\nos.makedirs('checkpoints/step-00000010'); time.sleep(4); open('ended', 'w')"
    run.tell(1, 0.01, after, export=["/bin/sh", "-c", beside])
    ending, _, _ = run.follow()
    assert (ending["state"], ending["exit_code"]) == ("ended", 0)
    assert begun(int((run.directory / "exporter").read_text())) is None


def test_a_cut_connection_is_made_again_and_nothing_is_lost_or_doubled(run: Run, tmp_path: Path) -> None:
    run.tell(150, 0.05)
    told: list[str] = []
    events: list[dict[str, Any]] = []
    copy = Copy(tmp_path / EVENTS)

    async def follow() -> dict[str, Any]:
        following = asyncio.create_task(run.follower(told, events, copy).until_its_end())
        for times in (1, 2):
            while not events:
                await asyncio.sleep(0.05)
            await asyncio.to_thread(run.host.cut)
            while sum("there again" in text for text in told) < times:
                await asyncio.sleep(0.05)
        return await asyncio.wait_for(following, 40)

    ending = asyncio.run(follow())
    assert ending["exit_code"] == 0
    assert steps(events) == list(range(150))
    assert (tmp_path / EVENTS).read_bytes() == (run.directory / EVENTS).read_bytes()
    assert ["trying again" in text for text in told] == [True, False] * 2


def test_the_server_goes_and_comes_back(run: Run) -> None:
    run.tell(30, 0.05)
    told: list[str] = []
    events: list[dict[str, Any]] = []

    async def follow() -> dict[str, Any]:
        following = asyncio.create_task(run.follower(told, events).until_its_end())
        await asyncio.sleep(0.5)
        run.host.stop()
        await asyncio.sleep(1.5)
        assert "trying again" in told[0]
        run.host.start()
        return await asyncio.wait_for(following, 40)

    assert asyncio.run(follow())["exit_code"] == 0
    assert steps(events) == list(range(30))


def test_a_host_that_stays_away_is_given_up(run: Run) -> None:
    run.tell(1, 0)
    run.host.stop()
    told: list[str] = []
    follower = run.follower(told, [])
    follower._patience = Patience("server1", told.append, give_up_s=0.5)
    with pytest.raises(ServerUnreachable, match=r"goes on by itself: `manyhands hosts attach`"):
        asyncio.run(asyncio.wait_for(follower.until_its_end(), 30))


@pytest.mark.parametrize(
    ("whom", "words"),
    [
        ("child", r"the training on server1 was killed by SIGKILL\. Its last lines:\n(.*\n)*  line \d+$"),
        (
            "pid",
            r"the supervisor on server1 was killed, and the training is ended with it.*\n(.*\n)*  line \d+$",
        ),
    ],
)
def test_a_kill_is_seen_within_seconds_with_the_last_lines(run: Run, whom: str, words: str) -> None:
    status = run.tell(10_000, 0.05)
    killed: list[float] = []

    async def follow() -> dict[str, Any]:
        following = asyncio.create_task(run.follower([], []).until_its_end())
        await asyncio.sleep(1)
        os.kill(status[whom], signal.SIGKILL)
        killed.append(time.monotonic())
        return await following

    ending = asyncio.run(asyncio.wait_for(follow(), 30))
    assert time.monotonic() - killed[0] < 5
    assert re.search(words, words_of("server1", ending)), words_of("server1", ending)
    assert exit_code_of(ending) == (137 if whom == "child" else WorkerError.exit_code)
    end = time.monotonic() + 10
    while begun(status["child"]) is not None:  # SIGTERM comes to it with the supervisor's death
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_runs_directory_is_lost(run: Run) -> None:
    status = run.tell(10_000, 0.05)
    elsewhere = run.directory.with_name(f"{run.directory.name}-gone")

    async def follow() -> dict[str, Any]:
        following = asyncio.create_task(run.follower([], []).until_its_end())
        await asyncio.sleep(0.7)
        run.directory.rename(elsewhere)  # at once: it is being written to
        return await following

    ending = asyncio.run(asyncio.wait_for(follow(), 30))
    assert "the run's directory on server1 is gone" in words_of("server1", ending)
    end = time.monotonic() + 20
    while begun(status["pid"]) is not None or begun(status["child"]) is not None:  # they end by themselves
        assert time.monotonic() < end
        time.sleep(0.02)
    subprocess.run(["rm", "-rf", str(elsewhere)], check=True)


def test_nothing_was_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.directory.mkdir(parents=True)
    text = program(AGENT).replace("BEGIN_S = 20.0", "BEGIN_S = 0.5")
    monkeypatch.setattr("manyhands.hosts.agent.program", lambda _modules: text)
    ending, events, _ = run.follow()
    assert "nothing was started on server1" in words_of("server1", ending)
    assert (events, exit_code_of(ending)) == ([], WorkerError.exit_code)


def test_a_status_that_cannot_be_read_any_more(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = program(AGENT).replace("UNREADABLE_S = 10.0", "UNREADABLE_S = 0.5")
    monkeypatch.setattr("manyhands.hosts.agent.program", lambda _modules: text)
    status = run.start("/bin/sleep", "100")
    whole = (run.directory / "status.json").read_text()
    (run.directory / "status.json").write_text("{")
    try:
        ending, _, _ = run.follow()
        assert "cannot be read any more (status.json): nobody knows how it ended" in words_of(
            "server1", ending
        )
        assert exit_code_of(ending) == WorkerError.exit_code
        assert begun(status["child"]) is not None
    finally:
        (run.directory / "status.json").write_text(whole)


def test_a_full_disk_there_still_gives_the_end_and_the_last_lines(
    run: Run, tmpfs: Callable[[Path], Path]
) -> None:
    small = tmpfs(run.host.home / "small")
    full = Run(run.host, small / "run")
    full.start(
        "/usr/bin/env", "python3", "-c",
        "import sys\nprint('it begins', flush=True)\ntry:\n  open('big', 'wb', 0).write(bytes(64 << 20))\n"
        "  open('big2', 'wb', 0).write(bytes(64 << 20))\nexcept OSError as e: print(e, flush=True)\n"
        "print('x' * 100000, flush=True)\nprint('no space for this', flush=True)\nsys.exit(9)",
    )  # fmt: skip
    ending, _, _ = full.follow()
    assert (ending["state"], exit_code_of(ending)) == ("ended", 9)
    assert ending["tail"][-1] == "no space for this"
    assert "its disk is full" in words_of("server1", ending)


def test_a_full_disk_here_is_told_and_the_training_goes_on(
    run: Run, tmpfs: Callable[[Path], Path], tmp_path: Path
) -> None:
    here = tmpfs(tmp_path / "here")
    (here / "filling").write_bytes(bytes(here.stat().st_blksize) * 10)
    with contextlib.suppress(OSError), (here / "filling").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    run.tell(2000, 0.001)
    with pytest.raises(StorageError, match="free space here: the training goes on there"):
        asyncio.run(asyncio.wait_for(run.follower([], [], Copy(here / EVENTS)).until_its_end(), 30))


def test_two_followers_write_the_same_copy(run: Run, tmp_path: Path) -> None:
    run.tell(40, 0.02)
    first: list[dict[str, Any]] = []
    second: list[dict[str, Any]] = []

    async def both() -> None:
        follow = [run.follower([], seen, Copy(tmp_path / EVENTS)).until_its_end() for seen in (first, second)]
        await asyncio.wait_for(asyncio.gather(*follow), 40)

    asyncio.run(both())
    assert steps(first) == steps(second) == list(range(40))
    assert (tmp_path / EVENTS).read_bytes() == (run.directory / EVENTS).read_bytes()


def test_another_terminal_goes_on_at_the_copy(run: Run, tmp_path: Path) -> None:
    run.tell(10, 0)
    run.follow()
    whole = (run.directory / EVENTS).read_bytes()
    (tmp_path / EVENTS).write_bytes(whole[: len(whole) // 2])  # in the middle of a line, and of a character
    events: list[dict[str, Any]] = []
    follower = run.follower([], events, Copy(tmp_path / EVENTS))
    follower.go_on_from_here(replay=True)
    assert 0 < len(events) < 10
    asyncio.run(follower.until_its_end())
    assert steps(events) == list(range(10))
    assert (tmp_path / EVENTS).read_bytes() == whole


def test_stop_asks_the_program_and_now_ends_all_that_it_started(run: Run) -> None:
    asked = "import signal, subprocess, sys, time\n" \
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(130)))\n" \
        "child = subprocess.Popen(['sleep', '100'])\nprint(child.pid, flush=True)\ntime.sleep(100)"  # fmt: skip

    def stop(now: bool) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            async with reached(host_named("server1")) as there:
                await there.ask("stop", run=str(run.directory), now=now)
            return await run.follower([], []).until_its_end()

        run.start("/usr/bin/env", "python3", "-c", asked)
        time.sleep(0.5)
        return asyncio.run(asyncio.wait_for(ask(), 20))

    ending = stop(now=False)
    assert (ending["exit_code"], ending["tail"][-1]) == (130, "saved")
    assert begun(int(ending["tail"][-2])) is None
    ending = stop(now=True)
    assert (ending["exit_code"], ending["signal"]) == (137, 9)
    assert words_of("server1", ending) == "the training on server1 was asked to end at once, and has ended"
    assert begun(int(ending["tail"][-1])) is None


def test_one_that_was_asked_twice_saves_and_its_graphs_are_made(run: Run) -> None:
    """As by a person and then because another host of it has ended."""
    twice = "import signal, sys, time\nasked = []\nsignal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n" \
        "print('begun', flush=True)\nwhile not asked: time.sleep(0.1)\n" \
        "time.sleep(2)\nsys.exit(130 if len(asked) == 1 else 143)"  # fmt: skip

    async def ask() -> dict[str, Any]:
        async with reached(host_named("server1")) as there:
            for _ in range(2):
                answer = await there.ask("stop", run=str(run.directory), now=False)
                assert stop_in_words(answer["status"], now=False) == "is asked to save and end"
                await asyncio.sleep(0.5)
            while answer["status"]["phase"] == "training":
                await asyncio.sleep(0.2)
                answer = await there.ask("status", run=str(run.directory))
            answer = await there.ask("stop", run=str(run.directory), now=False)
            said = stop_in_words(answer["status"], now=False)
            assert said == "has ended, and makes ONNX graphs of its checkpoints"
        return await run.follower([], []).until_its_end()

    run.start("/usr/bin/env", "python3", "-c", twice, export=["/bin/sh", "-c", "sleep 3; touch after"])
    time.sleep(1)
    ending = asyncio.run(asyncio.wait_for(ask(), 30))
    assert ending["exit_code"] == 130
    assert (run.directory / "after").exists()


def test_the_environment_of_a_job_is_nobody_elses(run: Run) -> None:
    run.tell(1, 0)
    (run.directory / "job.json").chmod(0o644)
    run.directory.chmod(0o755)
    run.follow()
    run.tell(1, 0, environment={"TOKEN": "secret"})
    assert "secret" in (run.directory / "job.json").read_text()
    assert (run.directory / "job.json").stat().st_mode & 0o777 == 0o600
    assert run.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "fields",
    [{"file": "plan.yaml", "offset": 0}, {"file": EVENTS, "offset": 1 << 40}, {"file": []}, {"status": 7}],
)
def test_what_was_not_asked_for_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    class Lying:
        async def stream(self, _op: str, **_fields: Any) -> AsyncIterator[Answer]:
            yield Answer(fields, bytearray(b"x"))

    follower = Follower(
        Host(host_name="server1"), "/runs/a", events=Copy(tmp_path / EVENTS), on_event=print, tell=print
    )
    with pytest.raises(ProtocolError, match="server1"):
        asyncio.run(follower._listen(cast(Agent, Lying()), {}))
    assert not list(tmp_path.iterdir())


def test_one_training_at_a_time_in_a_directory(run: Run) -> None:
    run.tell(10_000, 0.05)
    with pytest.raises(WorkerError, match=r"a training runs in .* already"):
        run.tell(1, 0)


def test_a_program_that_cannot_be_started(run: Run) -> None:
    run.start("/nowhere/python")
    ending, _, _ = run.follow()
    assert exit_code_of(ending) == 127
    assert "/nowhere/python cannot be started" in ending["tail"][-1]
