"""The order in which shards are read for training: shuffled anew in each epoch, and yet from few places at a time.

A permutation of all rows, as of data/permutation.py, would have every batch touch as many row groups as it has rows,
and a row group of 8,192 rows must be decompressed to read one of them. So the row groups are permuted, cut into
windows of `WINDOW` groups, and the rows are permuted within each window: a batch touches one window, and a window's
groups are decompressed once in an epoch. Position -> row is a pure function of (rows of the groups, seed, epoch), so
the engine's cursor of one integer, its exact resume and its exact split among ranks hold for shards as they are.

How well it mixes: two rows can meet in a batch if their groups are in one window, which changes with every epoch.
That is enough because rows have been permuted as a whole when they were made (tasks/packing.py), so that a group is
a sample of everything already.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from manyhands.data.permutation import permute, splitmix64

Int64s = npt.NDArray[np.int64]

WINDOW: Final = 32
"""Row groups that are mixed with each other: up to 262,144 rows or 64 MiB (making.py)."""


class BlockOrder:
    """Positions of an epoch -> rows, for row groups of these sizes. `first`: int64 [groups + 1], where each is."""

    def __init__(self, group_rows: Sequence[int], window: int = WINDOW) -> None:
        self.first: Int64s = np.concatenate([[0], np.cumsum(np.asarray(group_rows, dtype=np.int64))])
        self._rows = np.diff(self.first)
        self._window = window
        self._epoch = lru_cache(maxsize=2)(self._epoch_of)

    @property
    def total(self) -> int:
        return int(self.first[-1])

    def rows(self, positions: Int64s, seed: int, epoch: int) -> Int64s:
        """The rows at `positions` (int64 [n], each in [0, total)) of an epoch: int64 [n]. A bijection."""
        groups, starts, windows = self._epoch(seed, epoch)
        of = np.searchsorted(windows, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for number in np.unique(of):
            mine = of == number
            start, stop = int(windows[number]), int(windows[number + 1])
            within = permute(positions[mine] - start, stop - start, _mixed(seed, epoch), int(number))
            shuffled[mine] = start + within
        place = np.searchsorted(starts, shuffled, side="right") - 1
        rows: Int64s = self.first[groups[place]] + shuffled - starts[place]
        return rows

    def window_groups(self, position: int, seed: int, epoch: int) -> Int64s:
        """The row groups of the window that this position is in, in the order in which they lie there."""
        groups, _, windows = self._epoch(seed, epoch)
        number = int(np.searchsorted(windows, position, side="right")) - 1
        return groups[number * self._window : (number + 1) * self._window]

    def window_end(self, position: int, seed: int, epoch: int) -> int:
        """The first position behind the window that this position is in."""
        windows = self._epoch(seed, epoch)[2]
        return int(windows[np.searchsorted(windows, position, side="right")])

    def _epoch_of(self, seed: int, epoch: int) -> tuple[Int64s, Int64s, Int64s]:
        """The groups in the order of an epoch, where each starts, and where each window starts (and the total)."""
        count = len(self._rows)
        groups = permute(np.arange(count, dtype=np.int64), count, seed, epoch)
        starts: Int64s = np.concatenate([[0], np.cumsum(self._rows[groups])])
        windows = np.append(starts[0 : count : self._window], starts[-1])
        return groups, starts[:-1], windows


def _mixed(seed: int, epoch: int) -> int:
    """A seed for the windows of an epoch, apart from that of the groups."""
    return splitmix64(splitmix64(seed) ^ epoch ^ (1 << 63))
