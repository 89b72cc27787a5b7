"""What a distance to zero says: Syzygy's numbers, outcomes under the 50-move rule, and which of two is better.

A distance counts plies to the next capture or pawn move, or to mate, both sides playing for it: above 0 for the
mover's win, below 0 for its loss, 0 for a draw. Beyond 100 the 50-move rule comes first: a cursed win or a blessed
loss, which are draws. Syzygy's value ("WDL") is 2, 1, 0, -1, -2 for win, cursed win, draw, blessed loss, loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

WITHIN_RULE = 100
LOSS, DRAW, WIN = 0, 1, 2
_FARTHEST = 1 << 12
"""Beyond any distance to zero."""


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The truth of R positions and of their L legal moves, by position and number; all int64."""

    wdl: Int64s
    """[R], -2..2"""
    dtz: Int64s
    """[R]"""
    row: Int64s
    """[L]: which position it is a move of."""
    number: Int64s
    """[L]: from + 64 * to + 4096 * promotion."""
    distance: Int64s
    """[L]: to zero, for the mover, when it plays the move."""


def before_zeroing(wdl: Int64s) -> Int64s:
    """The distance before a capture or pawn move that leads to this value (for who makes it)."""
    found: Int64s = np.array([-1, -WITHIN_RULE - 1, 0, WITHIN_RULE + 1, 1])[wdl + 2]
    return found


def value(wdl: Int64s) -> Int64s:
    """LOSS, DRAW or WIN of Syzygy's values."""
    found: Int64s = np.array([LOSS, DRAW, DRAW, DRAW, WIN])[wdl + 2]
    return found


def outcome(distance: Int64s) -> Int64s:
    """LOSS, DRAW or WIN of distances."""
    found: Int64s = 1 + np.sign(distance) * (np.abs(distance) <= WITHIN_RULE)
    return found


def rank(distance: Int64s) -> Int64s:
    """The higher the better: short wins, long wins, cursed ones, draws, blessed losses, long losses, short ones."""
    found: Int64s = np.sign(distance) * _FARTHEST - distance
    return found
