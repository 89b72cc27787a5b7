"""Training on shards by the installed command: which rows are read, by whom, and when it goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.chaos]

MANYHANDS = str(Path(sys.executable).with_name("manyhands"))
TASK = '''
    """A task that writes down which rows it learns from: one line for each batch, one file for each rank."""
    import os, time
    import numpy as np, torch
    from safetensors.torch import load_file, save_file
    from manyhands.plan.descriptor import Parameter
    from manyhands.tasks.protocol import Loss, Metrics, Prepared

    class Numbered:
        unit, evaluation_sets = "samples", ("validation",)
        def __init__(self, numbers): self.numbers = numbers
        def build_model(self): return torch.nn.Linear(1, 1)
        def samples(self, split="training"): return len(self.numbers) if split == "training" else 8
        def batch(self, indices, split="training"): return {"number": self.numbers[torch.from_numpy(indices)]}
        def loss(self, model, batch):
            mean = model(batch["number"][:, None].float() / 100).square().mean()
            if torch.is_grad_enabled():
                time.sleep(0.03)
                with open(f"{os.environ['SEEN']}-{os.environ.get('RANK', '0')}", "a") as file:
                    file.write(" ".join(map(str, batch["number"].tolist())) + "\\n")
            return Loss(mean=mean, count=len(batch["number"]))
        def metrics(self, split): return Metrics(self)
        def tokens_per_sample(self): return 1
        def save_pretrained(self, weights, directory):
            directory.mkdir(parents=True, exist_ok=True)
            save_file(dict(weights), directory / "model.safetensors")

    class Family:
        def prepare(self, plan, directory):
            directory.mkdir(parents=True, exist_ok=True)
            save_file({"numbers": torch.arange(203)}, directory / "numbers.safetensors")
            save_file({"weight": torch.ones(1, 1), "bias": torch.zeros(1)}, directory / "first.safetensors")
            shapes = (("weight", (1, 1)), ("bias", (1,)))
            return Prepared(
                materials={"numbers.safetensors": directory / "numbers.safetensors"}, samples=203,
                parameters=tuple(Parameter(name=n, shape=s) for n, s in shapes),
                first_weights=directory / "first.safetensors",
            )
        def open(self, plan, materials): return Numbered(load_file(materials / "numbers.safetensors")["numbers"])

    FAMILY = Family()
'''
WORDS = (
    "local.steps=10", "local.batch_size=8", "rounds.total=6", "rounds.snapshot_every=2", "exec.threads=1",
    "evaluation.every_snapshots=0", "optimizer.lr=0.01", "exec.device=cpu",
)  # fmt: skip


class Place:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "numbered.py").write_text(textwrap.dedent(TASK), encoding="utf-8")

    def start(self, name: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [MANYHANDS, *words, "--allow-task", "numbered:FAMILY"],
            cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "SEEN": str(self.directory / f"seen-{name}"), "MANYHANDS_HOME": str(self.directory)},
        )  # fmt: skip

    def run(self, name: str, *words: str) -> None:
        process = self.start(name, *words)
        text = process.communicate(timeout=200)[0]
        assert process.returncode == 0, text

    def seen(self, name: str, rank: int) -> list[list[int]]:
        """Of a rank, the rows of each step; those of the task's check, before the training, left out."""
        lines = (self.directory / f"seen-{name}-{rank}").read_text().splitlines()
        steps = [[int(number) for number in line.split()] for line in lines]
        return steps[-60:]

    def result(self, name: str) -> float:
        """The validation loss at the end."""
        lines = (self.directory / name / "events.jsonl").read_text().splitlines()
        (finished,) = [event for line in lines if (event := json.loads(line))["kind"] == "finished"]
        return float(finished["validation_loss_after"])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.run("pack", "shards", "pack", "--out", "data", "--rows-per-shard", "32", "--processes", "1",
              "task.name=custom", "task.target=numbered:FAMILY")  # fmt: skip
    return place


def test_ranks_and_resumed_trainings_read_each_row_once_in_an_epoch(place: Place) -> None:
    """60 steps of 8 rows are more than two epochs of 203 rows; an epoch ends in the middle of a step."""
    place.run("two", "train", "--shards", "data", *WORDS, "processes=2", "--directory", "two")
    stopped = place.start("one", "train", "--shards", "data", *WORDS, "--directory", "one")
    end = time.monotonic() + 120
    while not (place.directory / "one" / "checkpoints").is_dir():
        assert stopped.poll() is None, stopped.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)
    stopped.send_signal(signal.SIGINT)
    assert "go on with --resume" in stopped.communicate(timeout=120)[0]
    assert stopped.returncode == 130
    place.run("one", "train", "--resume", "one", "--directory", "one")

    alone = place.seen("one", 0)
    ranks = [place.seen("two", rank) for rank in (0, 1)]
    assert len(alone) == 60
    assert [a + b for a, b in zip(*ranks, strict=True)] == alone
    assert {len(step) for rank in ranks for step in rank} == {4}
    stream = [row for step in alone for row in step]
    assert sorted(stream[:203]) == sorted(stream[203:406]) == list(range(203))
    assert stream[:203] != stream[203:406]
    assert place.result("one") == pytest.approx(place.result("two"), rel=1e-5)
