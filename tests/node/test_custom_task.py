"""A user's own task, served, worked on and evaluated by the installed command in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TASK = '''
"""Least squares on made-up points: small, but a model, data, a loss and a checkpoint."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from manyhands.plan.descriptor import Parameter
from manyhands.tasks.protocol import Loss, Metrics, Prepared

SHAPES = {"weight": (1, 4), "bias": (1,)}


class Line:
    unit = "samples"
    evaluation_sets = ("validation",)

    def __init__(self, points):
        self.points = torch.from_numpy(points)

    def build_model(self):
        return torch.nn.Linear(4, 1)

    def samples(self, split="training"):
        return len(self.points) - 16 if split == "training" else 16

    def batch(self, indices, split="training"):
        rows = self.points[torch.from_numpy(indices) + (0 if split == "training" else self.samples())]
        return {"x": rows[:, :4], "y": rows[:, 4:]}

    def loss(self, model, batch):
        mean = torch.nn.functional.mse_loss(model(batch["x"]), batch["y"])
        return Loss(mean=mean, count=len(batch["x"]))

    def metrics(self, split):
        return Metrics(self)

    def tokens_per_sample(self):
        return 1

    def save_pretrained(self, weights, directory: Path):
        save_file(dict(weights), directory / "line.safetensors")


class Lines:
    def prepare(self, plan, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        source = np.random.default_rng(plan.seed)
        x = source.normal(size=(plan.task.settings["samples"], 4)).astype(np.float32)
        points = np.concatenate([x, x.sum(1, keepdims=True) + 1], axis=1).astype(np.float32)
        np.save(directory / "points.npy", points)
        first = directory / "first.safetensors"
        save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, first)
        return Prepared(
            materials={"points.npy": directory / "points.npy"},
            samples=len(points) - 16,
            parameters=tuple(Parameter(name=name, shape=shape) for name, shape in SHAPES.items()),
            first_weights=first,
        )

    def open(self, plan, materials: Path):
        return Line(np.load(materials / "points.npy"))


FAMILY = Lines()
'''
TARGET = "somebodys_lines:FAMILY"
PLAN: dict[str, Any] = {
    "name": "lines",
    "run_id": "run",
    "task": {"name": "custom", "target": TARGET, "settings": {"samples": 400}},
    "local": {"steps": 5, "batch_size": 8, "optimizer": {"name": "sgd", "lr": 0.05, "weight_decay": 0.0}},
    "membership": {"min_clients": 1},
    "evaluation": {"every_snapshots": 1, "max_batches": 2},
    "rounds": {"total": 2, "snapshot_every": 1, "min_work_share": 1.0, "warmup_s": 60},
}


@pytest.fixture(autouse=True)
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "somebodys_lines.py").write_text(TASK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))


def test_a_task_of_ones_own_is_served_worked_on_and_evaluated(house: Any) -> None:
    house.plan(PLAN)
    house.server("--allow-task", TARGET)
    client = house.client("ann", "--allow-task", TARGET)
    assert client.ended() == 0, client.text()
    view = house.until_phase("finished")
    assert view["closed_rounds"] == 2
    assert house.counted(client) == [0, 1]
    losses = {e["round"]: e["loss"] for e in view["evaluations"]}
    assert losses[2] < losses[0], "it learned nothing"
    assert (Path(view["checkpoint"]) / "line.safetensors").exists()


def test_a_server_and_a_client_run_nobodys_code_unasked(house: Any) -> None:
    house.plan(PLAN)
    server = house.server(wait=False)
    assert server.ended() == 3
    assert "--allow-task somebodys_lines:FAMILY" in server.text()
    house.server("--allow-task", TARGET)
    client = house.client("ann", "--allow-task", "somebody_elses:FAMILY")
    assert client.ended() == 3, client.text()
    assert "the plan names code to run, which is not allowed here" in " ".join(client.text().split())
