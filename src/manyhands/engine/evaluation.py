"""The loss on held-out samples: what a run is judged by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from manyhands.engine.precision import computing_in
from manyhands.engine.settings import EngineSettings, Precision
from manyhands.engine.world import ALONE, World
from manyhands.errors import DataError, NotFinite
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import VALIDATION, Listing, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationResult:
    """`loss` is a mean over `count` (tokens, samples: the task's unit); `metrics` are the task's own."""

    loss: float
    count: int
    samples: int
    seconds: float  # from the first batch to the last figure
    metrics: Mapping[str, float]
    listings: tuple[Listing, ...] = ()
    picture: bytes | None = None  # a PNG of predictions, of tasks that draw one


def evaluate(
    task: Task,
    model: torch.nn.Module,
    batches: int,
    batch_size: int,
    *,
    split: str = VALIDATION,
    micro_batch_size: int | None = None,
    world: World = ALONE,
    precision: Precision = "fp32",
) -> EvaluationResult:
    """Mean loss over up to `batches` times `batch_size` of a split's samples, each weighted by its count.

    The samples lie evenly over the whole split and are always the same ones, so results compare. They are taken
    `micro_batch_size` at a time (None: batch_size), by the data ranks in turn; the result is alike on all. The model
    is in training mode afterwards, also after an error. Raises DataError if there are no samples.
    """
    total = task.samples(split)
    wanted = min(total, batches * batch_size)
    if wanted == 0:
        raise DataError(
            f"the task has no {split} samples; give more data, or raise the share that is kept for {split}"
        )
    indices = np.arange(wanted, dtype=np.int64) * total // wanted
    size = micro_batch_size or batch_size
    starts = range(0, wanted, size)
    metrics, extra = task.metrics(split), task.metrics(split)
    started = time.perf_counter()
    seen: list[tuple[float, int]] = []  # loss and count of each batch
    model.eval()
    try:
        with torch.no_grad(), computing_in(precision, world.device):
            for turn in range(0, len(starts), world.data_size):
                number = turn + world.data_rank
                there = number < len(starts)  # where not, a sharded model needs this rank's part all the same
                start = starts[number if there else -1]
                batch = task.batch(indices[start : start + size], split)
                on_device = {name: tensor.to(world.device) for name, tensor in batch.items()}
                loss = (metrics if there else extra).add(model, on_device)
                if there:
                    seen.append((float(loss.mean), loss.count))
    finally:
        model.train()
        if isinstance(model, FSDPModule):  # left unsharded by a forward pass without a backward one, its next
            model.reshard()  # gradients would be wrong (torch 2.13)
    metrics.merge(world.gather_arrays(metrics.state()))
    parts = [part for each in world.gather_data(seen) for part in each]
    count = sum(n for _, n in parts)
    return EvaluationResult(
        loss=math.fsum(loss * n for loss, n in parts) / count if count else 0.0,
        count=count,
        samples=wanted,
        seconds=time.perf_counter() - started,
        metrics=metrics.values(),
        listings=metrics.listings(),
        picture=metrics.picture(),
    )


class Evaluations:
    """What a training is judged by now and then: each of the task's sets, reported; the loss is that on the first."""

    def __init__(
        self,
        task: Task,
        model: torch.nn.Module,
        plan: Plan,
        settings: EngineSettings,
        *,
        world: World,
        emit: Callable[..., None],
        directory: Path,
    ) -> None:
        self._task, self._model, self._plan, self._settings = task, model, plan, settings
        self._world, self._emit, self._directory = world, emit, directory
        self._last: tuple[int, float] | None = None  # at which step, and what

    def loss(self, step: int) -> float:
        """At this step, computed once. Raises NotFinite where it is not finite, by exec.on_nonfinite."""
        if self._last is None or self._last[0] != step:
            losses = [self._on(split, step) for split in self._task.evaluation_sets]
            self._last = (step, losses[0])
        return self._last[1]

    def _on(self, split: str, step: int) -> float:
        batch_size = self._plan.local.batch_size
        size = self._settings.parallel.micro_batch_size or max(1, batch_size // self._world.data_size)
        result = evaluate(
            self._task,
            self._model,
            self._plan.evaluation.max_batches,
            batch_size,
            split=split,
            micro_batch_size=size,
            world=self._world,
            precision=self._settings.exec.precision,
        )
        if not math.isfinite(result.loss):
            self._tell_not_finite(split, step, result.loss)
        self._emit(
            "evaluation",
            step=step,
            set=split,
            loss=result.loss,
            count=result.count,
            samples=result.samples,
            metrics=dict(result.metrics),
            picture=self._kept(split, step, result.picture),
        )
        return result.loss

    def _tell_not_finite(self, split: str, step: int, loss: float) -> None:
        found = f"the loss on {split} is {loss} at step {step}"
        if self._settings.exec.on_nonfinite == "stop":
            raise NotFinite(
                f"{found}: lower local.optimizer.lr, or look at the data; go on all the same with "
                "exec.on_nonfinite=skip"
            )
        self._emit(
            "warning", text=f"{found}: the training goes on (exec.on_nonfinite=skip); look at the data"
        )

    def _kept(self, split: str, step: int, picture: bytes | None) -> str | None:
        if picture is None or not self._world.leads:
            return None
        file = self._directory / "pictures" / f"step-{step:08}-{split}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(picture)
        return str(file)
