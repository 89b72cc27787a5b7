"""The samples of a step, in micro-batches, made while the step before computes where that pays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.ranges import indices_of, ranges_between
from manyhands.engine.world import World
from manyhands.tasks.protocol import Batch, OrdersSamples, Task


def step_indices(
    task: Task, first_sample: int, batch_size: int, seed: int, world: World
) -> npt.NDArray[np.int64]:
    """This data rank's part of the samples from `first_sample` on: int64 [batch_size / data ranks]."""
    samples = task.samples()
    ranges = ranges_between(first_sample, first_sample + batch_size, samples)
    if isinstance(task, OrdersSamples):
        own = task.order
        indices = indices_of(ranges, samples, seed, lambda positions, _, *epoch: own(positions, *epoch))
    else:
        indices = indices_of(ranges, samples, seed)
    return np.split(indices, world.data_size)[world.data_rank]


def micro_batches(task: Task, indices: npt.NDArray[np.int64], size: int | None) -> list[Batch]:
    """`indices` in batches of at most `size` samples (None: one)."""
    size = size or len(indices)
    return [task.batch(indices[start : start + size]) for start in range(0, len(indices), size)]


def made_ahead(
    make: Callable[[int], Sequence[Batch]], numbers: Iterable[int], device: torch.device
) -> Iterator[Sequence[Batch]]:
    """`make(number)` for each number; for a GPU one step ahead, in a thread and in pinned memory.

    On a CPU a thread beside it would only take the step's own cores.
    """
    if device.type != "cuda":
        for number in numbers:
            yield make(number)
        return

    def pinned(number: int) -> list[Batch]:
        return [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in make(number)]

    with ThreadPoolExecutor(1, thread_name_prefix="loader") as loader:
        waiting = None
        for number in numbers:
            following = loader.submit(pinned, number)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
