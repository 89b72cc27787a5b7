"""A checkpoint on its task's own evaluation sets: the same samples as during the training, or more of them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from manyhands.data.shards.decoded import BrokenShards
from manyhands.engine.evaluation import EvaluationResult, evaluate
from manyhands.engine.saved_run import model_of, open_task, own_family
from manyhands.errors import DataError
from manyhands.plan.schema import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One of the task's sets. `unit`: of what the loss is a mean over."""

    set: str
    unit: str
    result: EvaluationResult


def evaluate_checkpoint(
    checkpoint: Path,
    plan: Plan,
    materials: Path,
    *,
    device: torch.device,
    samples: int | None = None,
    allowed: Collection[str] = (),
) -> list[Evaluated]:
    """The losses and metrics of each evaluation set, the main one first, in fp32.

    `materials`: those of the training or the run. `samples`: of each set, in whole batches, evenly over it; None: as
    many as the plan's evaluation.max_batches. Raises DataError, StorageError, Refused.
    """
    try:
        return _evaluated(checkpoint, plan, materials, device, samples, allowed)
    except BrokenShards as error:
        raise DataError(
            f"shards: {error.fault}; an evaluation needs them as the training had them: put that file back, or say "
            "where a whole copy of the shards is (--shards DIR)"
        ) from error


def _evaluated(
    checkpoint: Path,
    plan: Plan,
    materials: Path,
    device: torch.device,
    samples: int | None,
    allowed: Collection[str],
) -> list[Evaluated]:
    task = open_task(plan, materials, allowed)
    model = model_of(task, plan, materials, checkpoint, own_family(plan, allowed)).to(device)
    batch_size = plan.local.batch_size
    if samples is not None:
        batch_size = min(batch_size, samples)
        batches = math.ceil(samples / batch_size)
    else:
        batches = plan.evaluation.max_batches
    return [
        Evaluated(set=name, unit=task.unit, result=evaluate(task, model, batches, batch_size, split=name))
        for name in task.evaluation_sets
    ]
