"""From the ranges that the coordinator hands out to the samples behind them.

An IndexRange holds positions of one epoch's permutation; the permutation (permutation.py) says which samples
they are. The same function serves a networked client, a replay and a run on one machine, so all of them read
the same data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from manyhands.coordination.types import IndexRange
from manyhands.data.permutation import permute
from manyhands.errors import DataError

Order = Callable[[npt.NDArray[np.int64], int, int, int], npt.NDArray[np.int64]]
"""(positions, total, seed, epoch) -> samples: a permutation for each total, seed and epoch."""


def indices_of(
    ranges: Iterable[IndexRange], total: int, seed: int, order: Order = permute
) -> npt.NDArray[np.int64]:
    """The samples of `ranges` (int64, [n]), in the order of the ranges and of the positions within them.

    `total` is the number of samples of an epoch, `seed` the plan's; `order`: that of an epoch. Raises DataError for
    a range outside [0, total).
    """
    parts = []
    for piece in ranges:
        if not 0 <= piece.start <= piece.stop <= total or piece.epoch < 0:
            raise DataError(
                f"index range [{piece.start}, {piece.stop}) of epoch {piece.epoch} does not lie within the "
                f"{total} samples of an epoch: the assignment belongs to other data; "
                "compare the run's materials"
            )
        parts.append(order(np.arange(piece.start, piece.stop, dtype=np.int64), total, seed, piece.epoch))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def ranges_between(start: int, stop: int, total: int) -> tuple[IndexRange, ...]:
    """Samples number `start` to `stop` (exclusive) of the endless stream epoch 0, epoch 1, ..., as ranges.

    This is the order in which one machine alone reads the data; its cursor is one integer.
    """
    ranges = []
    while start < stop:
        epoch, first = divmod(start, total)
        last = min(total, first + stop - start)
        ranges.append(IndexRange(epoch=epoch, start=first, stop=last))
        start += last - first
    return tuple(ranges)
