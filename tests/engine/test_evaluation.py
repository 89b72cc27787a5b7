from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.engine.evaluation import evaluate
from manyhands.errors import DataError
from manyhands.tasks.protocol import VALIDATION, Batch, Loss, Metrics


class Doubled(Metrics):
    """Twice the mean loss."""

    total, count = 0.0, 0

    def add(self, model: torch.nn.Module, batch: Batch) -> Loss:
        loss = super().add(model, batch)
        self.total += 2 * float(loss.mean) * loss.count
        self.count += loss.count
        return loss

    def values(self) -> dict[str, float]:
        return {"double": self.total / self.count}


class Uneven:
    """Sample i has the loss i and counts i + 1 times; so the mean must be weighted."""

    unit = "things"

    def __init__(self, samples: int, fails: bool = False) -> None:
        self.total, self.fails = samples, fails
        self.seen: list[int] = []

    def samples(self, split: str) -> int:
        assert split == VALIDATION
        return self.total

    def batch(self, indices: np.ndarray, split: str) -> Mapping[str, torch.Tensor]:
        assert split == VALIDATION
        self.seen += indices.tolist()
        return {"i": torch.from_numpy(indices)}

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> Loss:
        assert not model.training
        assert not torch.is_grad_enabled()
        if self.fails:
            raise RuntimeError("no")
        values, counts = batch["i"].double(), batch["i"] + 1
        mean = (values * counts).sum() / counts.sum()
        return Loss(mean=mean, count=int(counts.sum()))

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002
        return Doubled(self)


def test_the_mean_is_weighted_by_count() -> None:
    result = evaluate(Uneven(5), torch.nn.Linear(1, 1), 10, 2)  # type: ignore[arg-type]
    expected = sum(i * (i + 1) for i in range(5)) / 15
    assert result.loss == pytest.approx(expected)
    assert result.metrics == {"double": pytest.approx(2 * expected)}
    assert (result.count, result.samples) == (15, 5)


def test_fewer_batches_are_spread_over_the_whole_set() -> None:
    task = Uneven(100)
    assert evaluate(task, torch.nn.Linear(1, 1), 2, 5).samples == 10  # type: ignore[arg-type]
    assert task.seen == list(range(0, 100, 10))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_in_training_mode_afterwards(fails: bool) -> None:
    model = torch.nn.Linear(1, 1).eval()
    if fails:
        with pytest.raises(RuntimeError):
            evaluate(Uneven(5, fails=True), model, 1, 1)  # type: ignore[arg-type]
    else:
        evaluate(Uneven(5), model, 1, 1)  # type: ignore[arg-type]
    assert model.training


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no validation samples"):
        evaluate(Uneven(0), torch.nn.Linear(1, 1), 1, 1)  # type: ignore[arg-type]


def test_the_language_model_is_judged_on_text_it_does_not_train_on(world: Any) -> None:
    task = world.task()
    result = evaluate(task, task.build_model(), 1000, 4)
    assert result.samples == task.samples(VALIDATION)
    assert result.count == 16 * result.samples
    assert 2.0 < result.loss < 4.0  # about ln(vocabulary)
