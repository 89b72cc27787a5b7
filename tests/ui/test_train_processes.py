"""`manyhands train` with several processes of its own: the installed command, real kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from manyhands.ui.train_here import _carried_out

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

SMALL = (
    "name=tiny", "task.text.path=text.txt", "task.tokenizer.kind=byte", "task.block_size=16",
    "model.n_layer=1", "model.n_head=2", "model.n_embd=16", "local.steps=10", "local.batch_size=4",
    "rounds.total=12", "rounds.snapshot_every=2", "evaluation.every_snapshots=0", "evaluation.max_batches=2",
    "exec.threads=1",
)  # fmt: skip


MANYHANDS = (str(Path(sys.executable).with_name("manyhands")),)
TORCHRUN = (str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "-m", "manyhands")


class Training:
    """`manyhands train` in the background, with its events."""

    def __init__(
        self, directory: Path, *words: str, command: Sequence[str] = MANYHANDS, run: str = "run"
    ) -> None:
        self.directory = directory / run
        self.process = subprocess.Popen(
            [*command, "train", *SMALL, *words, "--directory", str(self.directory)],
            cwd=directory, env={**os.environ, "MANYHANDS_HOME": str(directory / "home")},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def events(self) -> list[dict[str, Any]]:
        file = self.directory / "events.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_for(self, kind: str, step: int = 0, within_s: float = 120) -> None:
        end = time.monotonic() + within_s
        while not any(e["kind"] == kind and e.get("step", 0) >= step for e in self.events()):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < end, f"no event {kind} at step {step}"
            time.sleep(0.05)

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if "--kept" in child.cmdline()]

    def text(self) -> str:
        return self.process.communicate(timeout=120)[0]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Training]]:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    started: list[Training] = []

    def begin(*words: str, **more: Any) -> Training:
        started.append(Training(tmp_path, *words, **more))
        return started[-1]

    yield begin
    for training in started:
        for child in (
            psutil.Process(training.process.pid).children(recursive=True) if _alive(training) else []
        ):
            child.kill()
        training.process.kill()
        training.process.communicate()


def _alive(training: Training) -> bool:
    return training.process.poll() is None


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_rank_that_is_killed_is_started_again_and_the_end_is_the_same(
    start: Callable[..., Training], tmp_path: Path, strategy: str
) -> None:
    words = ("processes=2", f"parallel.strategy={strategy}")
    training = start(*words)
    training.wait_for("saved", step=40)
    ranks = training.ranks()
    assert len(ranks) == 2
    ranks[1].kill()
    text = training.text()
    assert training.process.returncode == 0, text
    told = "rank 1 was killed by SIGKILL: starting again from the last checkpoint (1 of 2)"
    assert told in text
    events = training.events()
    assert told in [e["text"] for e in events if e["kind"] == "warning"]
    resumed = [e["step"] for e in events if e["kind"] == "resumed"]
    assert len(resumed) == 1
    assert resumed[0] >= 20
    finished = [e for e in events if e["kind"] == "finished"]
    assert len(finished) == 1

    (tmp_path / "run").rename(tmp_path / "killed")
    whole = start(*words)
    assert "restart" not in whole.text()
    (end,) = [e for e in whole.events() if e["kind"] == "finished"]
    assert end["validation_loss_after"] == finished[0]["validation_loss_after"]


def test_a_loss_that_is_not_finite_ends_all_ranks_with_the_reason_once(
    start: Callable[..., Training],
) -> None:
    training = start("processes=2", "optimizer.lr=1e30", "optimizer.clip_norm=0")
    text = training.text()
    assert training.process.returncode == 12, text
    assert "starting again" not in text
    assert text.count("lower local.optimizer.lr") == 1, text
    assert "no checkpoint is kept yet" in text
    assert "Traceback" not in text


def test_a_plan_that_is_wrong_is_said_once(start: Callable[..., Training]) -> None:
    training = start("processes=3", "parallel.tensor_parallelism=3")
    text = training.text()
    assert training.process.returncode == 3, text
    assert (
        text.count("=3 does not divide the 64 features of transformer.h.0.mlp.c_fc: choose a divisor") == 1
    ), text
    assert "Traceback" not in text


def test_kills_in_the_middle_of_a_sharded_save_lose_nothing(
    start: Callable[..., Training], tmp_path: Path
) -> None:
    """All processes at once, with a checkpoint half written; the end is that of a training that nobody killed."""
    words = ("processes=2", "parallel.strategy=fsdp", "rounds.snapshot_every=1", "local.steps=5")
    killed, place = 0, tmp_path / "run" / "checkpoints"
    for attempt in range(20):
        training = start(*words, *(() if attempt == 0 else ("resume=latest",)))
        while not (half := list(place.glob(".step-*.partial-*"))) and _alive(training):
            pass
        if not half:
            break
        for each in (*psutil.Process(training.process.pid).children(recursive=True), training.process):
            each.kill()
        training.process.wait()
        killed += bool(list(place.glob(".step-*.partial-*")))
        assert all((path / "training.json").is_file() for path in place.glob("step-*"))
        if killed == 2:
            break
    assert killed == 2
    rest = start(*words, "resume=latest")
    text = rest.text()
    assert rest.process.returncode == 0, text
    assert not list(place.glob(".step-*.partial-*"))
    (end,) = [e for e in rest.events() if e["kind"] == "finished"]
    (tmp_path / "run").rename(tmp_path / "killed")
    undisturbed = start(*words)
    assert undisturbed.process.wait() == 0
    (expected,) = [e for e in undisturbed.events() if e["kind"] == "finished"]
    assert end["validation_loss_after"] == expected["validation_loss_after"]


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_sigterm_saves_and_ends_all_ranks(
    start: Callable[..., Training], send: Callable[[int, int], None]
) -> None:
    training = start("processes=2", "rounds.total=1000")
    training.wait_for("step", step=20)
    ranks = training.ranks()
    send(training.process.pid, signal.SIGTERM)
    text = training.text()
    assert training.process.returncode == 130, text
    assert text.count("interrupted after step") == 1, text
    assert [e["kind"] for e in training.events()][-2:] == ["saved", "interrupted"]
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_sweep_that_is_asked_to_end_saves_the_one_that_runs(
    start: Callable[..., Training], number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    training = start("-m", "seed=1,2", "rounds.total=1000", run="sweep")
    training.directory /= "1"
    training.wait_for("step", step=20)
    send(training.process.pid, number)
    text = training.text()
    assert training.process.returncode == 130, text
    assert [e["kind"] for e in training.events()][-2:] == ["saved", "interrupted"]
    assert "[1/2] seed=1 was interrupted; the same command with resume=latest goes on" in text


def test_a_training_that_was_just_finishing_when_the_sweep_was_asked_to_end() -> None:
    obeys = (
        "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print(flush=True); "
    )
    threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert _carried_out([sys.executable, "-c", f"{obeys}time.sleep(60)"]) == (0, True)
    assert _carried_out([sys.executable, "-c", "raise SystemExit(4)"]) == (4, False)


def test_ranks_do_not_outlive_the_command(start: Callable[..., Training]) -> None:
    training = start("--data-parallelism", "2", "rounds.total=1000")
    training.wait_for("step", step=20)
    ranks = training.ranks()
    assert len(ranks) == 2, "as many as share the data are started"
    training.process.kill()
    gone, left = psutil.wait_procs(ranks, timeout=45)
    assert len(gone) == 2, left


def test_torchrun_just_works(start: Callable[..., Training]) -> None:
    training = start("rounds.total=2", command=TORCHRUN)
    text = training.text()
    assert training.process.returncode == 0, text
    (begun,) = [e for e in training.events() if e["kind"] == "started"]
    assert begun["processes"] == 2
    assert text.count("finished at step 20") == 1, "one rank tells"


def test_processes_started_by_hand_meet_and_differing_ones_are_told(start: Callable[..., Training]) -> None:
    ranks = [start(f"rank={rank}", "world_size=2", "rounds.total=2") for rank in (1, 0)]
    for rank in ranks:
        text = rank.text()
        assert rank.process.returncode == 0, text
    ranks = [
        start("rank=1", "world_size=2", "resume=latest", "rounds.total=2", "logging.every_steps=3"),
        start("rank=0", "world_size=2", "resume=latest", "rounds.total=2"),
    ]
    for rank in ranks:
        text = rank.text()
        assert rank.process.returncode == 3, text
        assert "the processes of this training differ in their engine's settings" in text
    assert "settings (logging.every_steps is 10 with rank 0 and 3 here): start all" in ranks[0].text()


def test_who_refuses_before_the_meeting_ends_the_others_with_the_reason(
    start: Callable[..., Training],
) -> None:
    whole = start("rounds.total=2")
    text = whole.text()
    assert whole.process.returncode == 0, text
    for _ in range(2):
        began = time.monotonic()
        ranks = [start(f"rank={rank}", "world_size=2", "rounds.total=2") for rank in (1, 0)]
        waited, refused = (rank.text() for rank in ranks)
        assert time.monotonic() - began < 60
        assert [rank.process.returncode for rank in ranks] == [14, 7]
        assert "error: rank 0 ended before the ranks met: " in waited
        assert "holds checkpoints of an earlier training: go on from it with --resume" in waited
        assert refused.partition("error: ")[2] in waited
    ranks = [start(f"rank={rank}", "world_size=2", "rounds.total=2", "resume=latest") for rank in (1, 0)]
    for rank in ranks:
        text = rank.text()
        assert rank.process.returncode == 0, text


def test_parts_of_a_model_are_not_saved_in_directories_of_their_own(start: Callable[..., Training]) -> None:
    """As on machines that share none. It is seen before the first step."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = ("master_addr=127.0.0.1", f"master_port={free.getsockname()[1]}", "nodes=2", "processes=1")
    ranks = [start(f"node_rank={rank}", *meeting, "parallel=fsdp", run=f"machine-{rank}") for rank in (0, 1)]
    for rank in ranks:
        text = rank.text()
        assert rank.process.returncode == 3, text
        assert "not all see rank 0's" in text
        assert not any(event["kind"] == "started" for event in rank.events())


def test_what_is_there_is_neither_overwritten_nor_taken_for_another(
    start: Callable[..., Training], tmp_path: Path
) -> None:
    whole = start("rounds.total=2")
    text = whole.text()
    assert whole.process.returncode == 0, text
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "materials").iterdir()}
    for words in (
        ["rounds.total=4"],
        ["rounds.total=4", "processes=2"],
        ["rounds.total=4", "--resume", str(tmp_path / "run"), "task.block_size=8"],
    ):
        again = start(*words)
        text = again.text()
        assert again.process.returncode == 7, text
        assert "starting again" not in text
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "materials").iterdir()}

    command = [
        *MANYHANDS,
        "train",
        "--resume",
        str(tmp_path / "run"),
        "--keep-checkpoints",
        "1",
        "--logs",
        "none",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [e["kind"] for e in whole.events()]
    assert kinds[kinds.index("resumed") :] == ["resumed", "started", "evaluation", "saved", "finished"]


def test_a_directory_trains_once_at_a_time(start: Callable[..., Training]) -> None:
    first = start("rounds.total=1000")
    first.wait_for("saved", step=20)
    second = start("rounds.total=1000", "resume=latest")
    text = second.text()
    assert second.process.returncode == 7, text
    assert f"is in use by process {first.process.pid}" in text
