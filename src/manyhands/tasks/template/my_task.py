"""A task of one's own: which rows of numbers are of which class. Change `read_samples`, `MyModel` and `MyTask.loss`.

manyhands train --plan plan.yaml --allow-task my_task:FAMILY
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from manyhands.errors import PlanError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import (
    TRAINING,
    VALIDATION,
    Batch,
    Loss,
    Metrics,
    Prepared,
    Saved,
    Task,
    TaskFamily,
)


def read_samples(file: str | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Your data, in any order: x, float32 [N, F], and y, int64 [N], from 0."""
    if file is not None:
        arrays = np.load(file)
        return arrays["x"].astype(np.float32), arrays["y"].astype(np.int64)
    generator = np.random.default_rng(seed)  # two spirals
    y = generator.integers(2, size=2000)
    angle = generator.uniform(0.5, 6, size=2000)
    x = np.stack([np.cos(angle + np.pi * y), np.sin(angle + np.pi * y)], axis=1) * angle[:, None]
    return (x + 0.2 * generator.normal(size=x.shape)).astype(np.float32), y


class MyModel(torch.nn.Module):
    """Your model. Without buffers such as those of BatchNorm."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = torch.nn.Linear(features, width)
        self.middle = torch.nn.Linear(width, width)
        self.last = torch.nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, features] -> [B, classes]."""
        x = torch.relu(self.middle(torch.relu(self.first(x))))
        out: torch.Tensor = self.last(x)
        return out


class MyTask:
    """Opened from the materials: samples by their indices, the model, its loss."""

    unit = "samples"
    evaluation_sets: tuple[str, ...] = (VALIDATION,)

    def __init__(self, width: int, data: Mapping[str, torch.Tensor]) -> None:
        self.width, self.data = width, data

    def build_model(self) -> torch.nn.Module:
        return MyModel(self.data["training.x"].shape[1], self.width, int(self.data["training.y"].max()) + 1)

    def samples(self, split: str = TRAINING) -> int:
        return len(self.data[f"{split}.y"])

    def batch(self, indices: np.ndarray, split: str = TRAINING) -> Batch:
        chosen = torch.from_numpy(indices)
        return {"x": self.data[f"{split}.x"][chosen], "y": self.data[f"{split}.y"][chosen]}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        mean = torch.nn.functional.cross_entropy(model(batch["x"]).float(), batch["y"])
        return Loss(mean=mean, count=len(batch["y"]))

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002 - the same for all
        return Accuracy(self)  # Metrics(self) has the loss alone

    def tokens_per_sample(self) -> int:
        return 1

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(weights), directory / "model.safetensors")


class Accuracy(Metrics):
    """What an evaluation adds up beside the loss."""

    def __init__(self, task: MyTask) -> None:
        super().__init__(task)
        self.right, self.seen = 0, 0

    def add(self, model: torch.nn.Module, batch: Batch) -> Loss:
        answers = model(batch["x"]).argmax(dim=1)
        self.right += int((answers == batch["y"]).sum())
        self.seen += len(answers)
        return self.task.loss(model, batch)

    def state(self) -> dict[str, np.ndarray]:
        return {"counts": np.array([self.right, self.seen])}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Of all processes of a training."""
        self.right, self.seen = np.sum([state["counts"] for state in states], axis=0).tolist()

    def values(self) -> dict[str, float]:
        return {"accuracy": self.right / self.seen}


class MyFamily:
    """`prepare` runs once; `open` wherever the model is trained, from the materials alone."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        directory.mkdir(parents=True, exist_ok=True)
        settings = _settings(plan)
        x, y = read_samples(settings["file"], plan.seed)
        order = np.random.default_rng(plan.seed).permutation(len(y))
        parts = {VALIDATION: order[: len(y) // 10], TRAINING: order[len(y) // 10 :]}
        data = {
            f"{split}.{n}": torch.from_numpy(a[p])
            for split, p in parts.items()
            for n, a in (("x", x), ("y", y))
        }
        save_file(data, directory / "samples.safetensors")
        torch.manual_seed(plan.seed)
        first = dict(MyTask(settings["width"], data).build_model().named_parameters())
        save_file({name: tensor.detach() for name, tensor in first.items()}, directory / "first.safetensors")
        return Prepared(
            materials={"samples.safetensors": directory / "samples.safetensors"},
            samples=len(parts[TRAINING]),
            parameters=tuple(
                Parameter(name=name, shape=tuple(tensor.shape)) for name, tensor in first.items()
            ),
            first_weights=directory / "first.safetensors",
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        return MyTask(_settings(plan)["width"], load_file(materials / "samples.safetensors"))

    def load_saved(self, directory: Path) -> Saved:
        """For `manyhands export`; leave it out if you need none."""
        weights = load_file(directory / "model.safetensors")
        width, features = weights["first.weight"].shape
        model = MyModel(features, width, len(weights["last.bias"])).eval()
        model.load_state_dict(weights)
        x = torch.linspace(-1, 1, 4 * features).view(4, features)
        return Saved(model=model, call=model, inputs={"x": x}, axes={"x": {0: "batch"}}, outputs=("logits",))


def _settings(plan: Plan) -> dict[str, Any]:
    known, given = {"file": None, "width": 32}, getattr(plan.task, "settings", {})
    if unknown := sorted({*given} - {*known}):
        raise PlanError(f"task.settings.{unknown[0]} is unknown: expected {', '.join(known)}")
    return {**known, **given}


FAMILY: TaskFamily = MyFamily()
