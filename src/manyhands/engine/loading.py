"""The samples of a step, in micro-batches, made while the step before computes where that pays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.ranges import indices_of, ranges_between
from manyhands.engine.world import World
from manyhands.tasks.protocol import Batch, OrdersSamples, Task

_ORDERED_AT_ONCE = 4096
"""Samples whose order is computed in one call, which costs as much for the few of a step."""


def step_indices(
    task: Task, first_sample: int, batch_size: int, steps: int, seed: int, world: World
) -> Iterator[npt.NDArray[np.int64]]:
    """This data rank's part of each of `steps` steps from `first_sample` on: int64 [batch_size / data ranks]."""
    together = max(1, _ORDERED_AT_ONCE // batch_size)
    for done in range(0, steps, together):
        count = min(together, steps - done)
        indices = _indices(task, first_sample + done * batch_size, count * batch_size, seed)
        yield from indices.reshape(count, world.data_size, -1)[:, world.data_rank]


def _indices(task: Task, first_sample: int, count: int, seed: int) -> npt.NDArray[np.int64]:
    samples = task.samples()
    ranges = ranges_between(first_sample, first_sample + count, samples)
    if isinstance(task, OrdersSamples):
        own = task.order
        return indices_of(ranges, samples, seed, lambda positions, _, *epoch: own(positions, *epoch))
    return indices_of(ranges, samples, seed)


def micro_batches(task: Task, indices: npt.NDArray[np.int64], size: int | None) -> list[Batch]:
    """`indices` in batches of at most `size` samples (None: one)."""
    size = size or len(indices)
    return [task.batch(indices[start : start + size]) for start in range(0, len(indices), size)]


def made_ahead(batches: Iterator[Sequence[Batch]], device: torch.device) -> Iterator[Sequence[Batch]]:
    """The same; for a GPU they are made one step ahead, in a thread and in pinned memory.

    On a CPU a thread beside it would only take the step's own cores.
    """
    if device.type != "cuda":
        yield from batches
        return

    def pinned() -> list[Batch] | None:
        made = next(batches, None)
        if made is None:
            return None
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in made]

    with ThreadPoolExecutor(1, thread_name_prefix="loader") as loader:
        waiting = loader.submit(pinned)
        while (ready := waiting.result()) is not None:
            waiting = loader.submit(pinned)
            yield ready
