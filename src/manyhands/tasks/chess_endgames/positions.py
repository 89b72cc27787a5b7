"""Random positions, uniform over the legal ones of a specification; row i depends on (seed, index i) alone.

Each try of a row is one 64-bit word, splitmix64's output number `try` of a state made from (seed, index): its
highest bit is the side to move, its lowest bits are the pieces' squares, six each. A try that is no legal position
(moves.is_legal), or has no legal move, is thrown away, and what is left is uniform over the pairs of side and legal
position. Pieces of a kind stand in any order, the same number of orders for every position.

Which ending a row is of is its word 0, by the specification's weights.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from manyhands.data.permutation import splitmix64
from manyhands.tasks.chess_endgames.moves import Int64s, Men, UInt64s, has_move, is_legal
from manyhands.tasks.chess_endgames.pieces import Ending, Specification

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def draw(specification: Specification, indices: Int64s, seed: int) -> Iterator[tuple[Int64s, Men]]:
    """The positions of `indices` (int64 [N], not negative), grouped by the mover's pieces: (rows, men) of each group
    that has any, rows into `indices`."""
    states = _states(indices, seed)
    bounds = np.cumsum(specification.weights)[:-1]
    which = np.searchsorted(bounds, (_mix(states) >> np.uint64(11)) * 2.0**-53, side="right")
    for number, ending in enumerate(specification.endings):
        rows = np.flatnonzero(which == number)
        if rows.size:
            yield from _draw_ending(ending, rows, states[rows])


def _draw_ending(ending: Ending, rows: Int64s, states: UInt64s) -> Iterator[tuple[Int64s, Men]]:
    words = np.zeros(len(rows), dtype=np.uint64)
    waiting = np.arange(len(rows))
    step = 0
    while waiting.size:
        step = (step + _GAMMA) & _MASK
        words[waiting] = _mix(states[waiting] + np.uint64(step))
        waiting = np.concatenate(
            [waiting[chosen[~_is_position(men)]] for chosen, men in _by_side(ending, words[waiting])]
        )
    for chosen, men in _by_side(ending, words):
        if chosen.size:
            yield rows[chosen], men


def _by_side(ending: Ending, words: UInt64s) -> Iterator[tuple[Int64s, Men]]:
    side = (words >> np.uint64(63)).astype(np.int64) % len(ending.sides)
    for number, (own, other) in enumerate(ending.sides):
        chosen = np.flatnonzero(side == number)
        shifts = np.arange(ending.men, dtype=np.uint64) * np.uint64(6)
        squares = (words[chosen, None] >> shifts & np.uint64(63)).astype(np.int64)
        split = len(own)
        yield (
            chosen,
            Men(own=own, other=other, own_squares=squares[:, :split], other_squares=squares[:, split:]),
        )


def _is_position(men: Men) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    good = is_legal(men)
    legal = np.flatnonzero(good)
    good[legal] = has_move(men.rows(legal))
    return good


def _states(indices: Int64s, seed: int) -> UInt64s:
    key = np.uint64(
        splitmix64(splitmix64(seed & _MASK) ^ 0x63686573)
    )  # "ches": other than data's permutation
    return _mix(_mix(indices.astype(np.uint64) + np.uint64(_GAMMA)) ^ key)


def _mix(z: UInt64s) -> UInt64s:
    """splitmix64's finalizer of each element (Steele, Lea and Flood 2014); products wrap modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
