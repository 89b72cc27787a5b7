"""Endings of three men solved here, without tables: values, distances to mate and distances to zero.

An independent check of Syzygy's tables, and the truth where there are none. All legal positions of both sides (one of
each set of mirror images) and all their moves are written down once; then mates are played backwards (Thompson 1986,
"Retrograde analysis of certain endgames"): who can move to a lost position wins, who can only move to won ones loses,
level by level. What captures and promotions lead to is solved first.

Values and distances are the same everywhere as those of Syzygy's tables.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.children import (
    MATED,
    UNREACHABLE,
    Distances,
    Followed,
    Values,
    dense_index,
    follow,
)
from manyhands.tasks.chess_endgames.distances import WITHIN_RULE, Int64s
from manyhands.tasks.chess_endgames.moves import Bools, Men, in_check, is_legal, legal_moves
from manyhands.tasks.chess_endgames.pieces import Ending, ending

MOST_MEN = 3
_UNDECIDED = -1


@dataclass(frozen=True, kw_only=True)
class _Solution:
    values: Values
    distances: Distances
    mates: Distances


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """All legal positions of an ending as numbers, and their moves, by the position that each is made in.

    A move leads to another position of the ending (`child`, else -1), or out of it (captures and promotions), where
    `left_value` and `left_mate` say what awaits the opponent.
    """

    numbers: tuple[Int64s, ...]
    """Of each side: the number of every position of its flat array, alike for mirror images; -1 for what is none."""
    positions: int
    mated: Int64s
    parent: Int64s
    child: Int64s
    zeroing: Bools
    left_value: Int64s
    left_mate: Int64s


@dataclass(frozen=True, kw_only=True)
class _Legal:
    """The legal positions of a side: one of each set of mirror images, and where all of them stand."""

    men: Men
    places: Int64s
    """In the flat array."""
    position: Int64s
    """Which of `men` each place's is an image of."""


class Solved:
    """The arrays of children.py for endings of up to three men; made when asked for and kept in memory."""

    def __init__(self) -> None:
        self._turn = threading.RLock()
        self._solutions: dict[tuple[str, str], _Solution] = {}

    def values(self, own: str, other: str) -> Values:
        return self._solution(own, other).values

    def distances(self, own: str, other: str) -> Distances:
        return self._solution(own, other).distances

    def mates(self, own: str, other: str) -> Distances:
        """int16, flat: plies to mate, signed for the mover; MATED where it is; 0 for a draw."""
        return self._solution(own, other).mates

    def _solution(self, own: str, other: str) -> _Solution:
        with self._turn:
            if (own, other) not in self._solutions:
                pieces = ending(own, other)
                if pieces.men > MOST_MEN:
                    raise DataError(
                        f"{pieces.table} has {pieces.men} men; without tables up to {MOST_MEN} are solved."
                    )
                for side, solution in zip(pieces.sides, self._solve(pieces), strict=True):
                    self._solutions[side] = solution
            return self._solutions[own, other]

    def _solve(self, pieces: Ending) -> list[_Solution]:
        graph = self._graph(pieces)
        inside = graph.child >= 0
        levels, won = _levels(graph, inside, np.where(inside, _UNDECIDED, np.abs(graph.left_mate)))
        sign = np.where(levels == _UNDECIDED, 0, np.where(won, 1, -1))
        # to zero: what a zeroing move leads to is known now, and is where the count begins
        quiet = inside & ~graph.zeroing
        known = replace(graph, left_value=np.where(inside, sign[graph.child], graph.left_value))
        plies, _ = _levels(known, quiet, np.where(quiet, _UNDECIDED, 0))
        return [
            _Solution(values=values, distances=distances, mates=mates)
            for values, distances, mates in zip(
                _arrays(graph, _syzygy_values(sign, plies), np.int8, UNREACHABLE),
                _arrays(graph, _signed(sign, plies, graph.mated), np.int16, 0),
                _arrays(graph, _signed(sign, levels, graph.mated), np.int16, 0),
                strict=True,
            )
        ]

    def _graph(self, pieces: Ending) -> _Graph:
        sides = [_legal_positions(own, other) for own, other in pieces.sides]
        first = dict(
            zip(pieces.sides, np.cumsum([0, *(len(one.men) for one in sides)]).tolist(), strict=False)
        )
        numbers = {}
        for side, known in zip(pieces.sides, sides, strict=True):
            numbers[side] = np.full(64**pieces.men, -1, dtype=np.int64)
            numbers[side][known.places] = known.position + first[side]
        edges, mated = [], []
        for side, known in zip(pieces.sides, sides, strict=True):
            moves = legal_moves(known.men)
            stuck = np.bincount(moves.row, minlength=len(known.men)) == 0
            mated.append(np.flatnonzero(stuck & in_check(known.men)) + first[side])
            edges += [
                (moves.row[kind.chosen] + first[side], *self._edges(kind, numbers))
                for kind in follow(known.men, moves)
            ]
        columns = [np.concatenate(column) for column in zip(*edges, strict=True)]
        parent, child, zeroing, left_value, left_mate = columns
        return _Graph(
            numbers=tuple(numbers[side] for side in pieces.sides),
            positions=sum(len(one.men) for one in sides),
            mated=np.concatenate(mated),
            parent=parent,
            child=child,
            zeroing=zeroing.astype(np.bool_),
            left_value=left_value,
            left_mate=left_mate,
        )

    def _edges(self, kind: Followed, numbers: dict[tuple[str, str], Int64s]) -> tuple[Int64s, ...]:
        """(child, zeroing, left_value, left_mate)"""
        after, place = kind.after, dense_index(kind.after)
        nothing = np.zeros(len(place), dtype=np.int64)
        if kind.same_pieces:
            return numbers[after.own, after.other][place], nothing + kind.zeroing, nothing, nothing
        solution = self._solution(after.own, after.other)
        mates = solution.mates[place].astype(np.int64)
        left_value = np.sign(solution.values[place].astype(np.int64))
        return nothing - 1, nothing + 1, left_value, np.where(mates == MATED, 0, mates)


def _levels(graph: _Graph, inside: Bools, known: Int64s) -> tuple[Int64s, Bools]:
    """Plies in which each position is decided (_UNDECIDED: drawn), and whether for the mover.

    Moves `inside` lead to positions that are decided here; the others to ones that are decided already
    (`left_value`), `known` plies from their end.
    """
    total = graph.positions
    levels, won = np.full(total, _UNDECIDED, dtype=np.int64), np.zeros(total, dtype=np.bool_)
    outside = np.flatnonzero(~inside & (graph.left_value != 0))
    if not (graph.mated.size or outside.size):
        return levels, won
    open_moves = np.bincount(graph.parent, minlength=total)
    order = np.flatnonzero(inside)
    order = order[np.argsort(graph.child[order])]
    backwards = graph.parent[order]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(graph.child[order], minlength=total))])
    last = int(known[outside].max(initial=0))
    levels[graph.mated] = 0
    fresh, level = graph.mated, 0
    while fresh.size or level <= last:
        arriving = outside[known[outside] == level]
        lost_after = graph.left_value[arriving] < 0
        wins = [_before(backwards, bounds, fresh[~won[fresh]]), graph.parent[arriving[lost_after]]]
        spent = [_before(backwards, bounds, fresh[won[fresh]]), graph.parent[arriving[~lost_after]]]
        level += 1
        winners = _undecided(levels, np.concatenate(wins))
        levels[winners], won[winners] = level, True
        spends = np.concatenate(spent)
        open_moves -= np.bincount(spends, minlength=total)
        losers = _undecided(levels, spends[open_moves[spends] == 0])
        levels[losers] = level
        fresh = np.concatenate([winners, losers])
    return levels, won


def _undecided(levels: Int64s, positions: Int64s) -> Int64s:
    """Those of `positions` that are still open, each once."""
    asked = np.zeros(len(levels), dtype=np.bool_)
    asked[positions] = True
    return np.flatnonzero(asked & (levels == _UNDECIDED))


def _before(backwards: Int64s, bounds: Int64s, positions: Int64s) -> Int64s:
    """The positions that have a move to one of these, once for each move."""
    starts, counts = bounds[positions], bounds[positions + 1] - bounds[positions]
    ends = np.cumsum(counts)
    within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)
    found: Int64s = backwards[np.repeat(starts, counts) + within]
    return found


def _legal_positions(own: str, other: str) -> _Legal:
    men = len(own) + len(other)
    grid = np.indices((64,) * men).reshape(men, -1)
    every = _men(own, other, grid)
    places = np.flatnonzero(is_legal(every))
    grid = grid[:, places]
    smallest = places
    for turn, mirror in ((turn, mirror) for turn in (False, True) for mirror in (0, 7, 56, 63)):
        if "P" not in own + other or (not turn and mirror in (0, 7)):
            image = (grid >> 3 | (grid & 7) << 3 if turn else grid) ^ mirror
            smallest = np.minimum(smallest, dense_index(_men(own, other, image)))
    chosen, position = np.unique(smallest, return_inverse=True)
    return _Legal(men=every.rows(chosen), places=places, position=position)


def _men(own: str, other: str, squares: Int64s) -> Men:
    return Men(own=own, other=other, own_squares=squares[: len(own)].T, other_squares=squares[len(own) :].T)


def _signed(sign: Int64s, plies: Int64s, mated: Int64s) -> Int64s:
    found = sign * plies
    found[mated] = MATED
    return found


def _syzygy_values(sign: Int64s, plies: Int64s) -> Int64s:
    """2 or -2, but 1 or -1 where the 50-move rule comes first."""
    return sign * np.where(plies > WITHIN_RULE, 1, 2)


def _arrays(
    graph: _Graph, found: Int64s, dtype: npt.DTypeLike, elsewhere: int
) -> list[npt.NDArray[np.signedinteger]]:
    """`found`, by number of position, as each side's flat array."""
    by_number = np.append(found, elsewhere).astype(dtype)
    return [by_number[numbers] for numbers in graph.numbers]
