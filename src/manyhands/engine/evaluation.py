"""The loss on validation samples: what a run is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from manyhands.engine.device import CPU
from manyhands.engine.precision import Precision, computing_in
from manyhands.errors import DataError
from manyhands.tasks.protocol import VALIDATION, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """`loss` and `metrics` are means over `count` (tokens, samples: the task's unit)."""

    loss: float
    count: int
    samples: int
    metrics: Mapping[str, float]


def evaluate(
    task: Task,
    model: torch.nn.Module,
    batches: int,
    batch_size: int,
    *,
    device: torch.device = CPU,
    precision: Precision = "fp32",
) -> EvaluationResult:
    """Mean loss over up to `batches` batches of validation samples, each weighted by its count.

    The samples lie evenly over the whole validation set and are always the same ones, so results compare. The
    model is in training mode afterwards, also after an error. Raises DataError if there are no samples.
    """
    total = task.samples(VALIDATION)
    wanted = min(total, batches * batch_size)
    if wanted == 0:
        raise DataError(
            "the task has no validation samples; give more text, or raise task.text.validation_share"
        )
    indices = np.arange(wanted, dtype=np.int64) * total // wanted
    losses: list[float] = []
    counts: list[int] = []
    metrics = task.metrics(VALIDATION)
    model.eval()
    try:
        with torch.no_grad(), computing_in(precision, device):
            for start in range(0, wanted, batch_size):
                batch = task.batch(indices[start : start + batch_size], VALIDATION)
                loss = metrics.add(model, {name: tensor.to(device) for name, tensor in batch.items()})
                losses.append(float(loss.mean))
                counts.append(loss.count)
    finally:
        model.train()
    count = sum(counts)
    return EvaluationResult(
        loss=math.fsum(loss * n for loss, n in zip(losses, counts, strict=True)) / count,
        count=count,
        samples=wanted,
        metrics=metrics.values(),
    )
