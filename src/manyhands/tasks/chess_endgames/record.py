"""The record of endgame positions: what shards hold and what the task learns from.

N rows, seen from the side to move (boards.py):

    squares     uint8 [N, 64]  0 empty, 1..6 the mover's P N B R Q K, 7..12 the opponent's
    en_passant  int8 [N]       the square behind a pawn that has just moved two, or -1
    value       uint8 [N]      0 loss, 1 draw, 2 win for the mover under the 50-move rule, its count at zero
    dtz         int16 [N]      Syzygy's distance to zero in plies, above 0 for a win; 0 where the value is a draw
    moves       int16 [N, M]   legal moves, ascending, from + 64 * to + 4096 * promotion (0 none, 1 N, 2 B, 3 R,
                               4 Q); -1 behind them
    outcomes    uint8 [N, M]   0, 1, 2 for the mover after each; 255 behind them
    best        uint8 [N, M]   1 for each move that keeps the best outcome and is the best of those by distance

Cursed wins and blessed losses (distances.py) are draws, but a move that keeps a cursed win is better than one that
only draws, as Syzygy ranks them. Best by distance: the fewest plies to zero for a win, the most for a loss; a move
that mates, captures, or moves a pawn is one ply from zero, so several moves may be best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import LETTERS, OTHER_SIDE, to_fen
from manyhands.tasks.chess_endgames.distances import DRAW, Int64s, Labels, outcome, rank, value
from manyhands.tasks.chess_endgames.moves import Men
from manyhands.tasks.chess_endgames.pieces import STRENGTH

Record = dict[str, npt.NDArray[Any]]
Column = tuple[str, np.dtype[Any], tuple[int, ...]]

NO_MOVE, NO_OUTCOME = -1, 255


def columns(moves: int) -> tuple[Column, ...]:
    """(name, dtype, shape of a row) of a record with room for so many moves."""
    return (
        ("squares", np.dtype(np.uint8), (64,)),
        ("en_passant", np.dtype(np.int8), ()),
        ("value", np.dtype(np.uint8), ()),
        ("dtz", np.dtype(np.int16), ()),
        ("moves", np.dtype(np.int16), (moves,)),
        ("outcomes", np.dtype(np.uint8), (moves,)),
        ("best", np.dtype(np.uint8), (moves,)),
    )


def empty_record(rows: int, moves: int) -> Record:
    """Rows with empty boards and no moves, to be filled in."""
    record = {name: np.zeros((rows, *shape), dtype) for name, dtype, shape in columns(moves)}
    record["en_passant"][:] = -1
    record["moves"][:] = NO_MOVE
    record["outcomes"][:] = NO_OUTCOME
    return record


def place(squares: npt.NDArray[np.uint8], rows: Int64s, men: Men) -> None:
    """Write the codes of `men` on the empty boards of these rows (uint8 [N, 64])."""
    for letters, stand in ((men.own, men.own_squares), (men.other.lower(), men.other_squares)):
        for letter, column in zip(letters, stand.T, strict=True):
            squares[rows, column] = LETTERS.index(letter)


def men_of(own: str, other: str, squares: npt.NDArray[np.uint8]) -> Men:
    """Positions ([N, 64]) that all have these pieces."""

    def stand(letters: str, first: int) -> Int64s:
        kinds = sorted(set(letters), key=STRENGTH.index)
        found = [
            np.nonzero(squares == first + LETTERS.index(kind))[1].reshape(-1, letters.count(kind))
            for kind in kinds
        ]
        return np.concatenate(found, axis=1).astype(np.int64)

    return Men(own=own, other=other, own_squares=stand(own, 0), other_squares=stand(other, OTHER_SIDE))


def by_pieces(squares: npt.NDArray[np.uint8]) -> Iterator[tuple[str, str, Int64s]]:
    """(the mover's pieces, the opponent's, rows) of each kind of position that is there. Raises DataError where a
    king is missing, or there is one too many."""
    counts = np.stack([(squares == code).sum(axis=1) for code in range(1, len(LETTERS))], axis=1)
    kinds, which = np.unique(counts, axis=0, return_inverse=True)
    for number, kind in enumerate(kinds.tolist()):
        own, other = (
            "".join(letter * kind["PNBRQK".index(letter) + side] for letter in STRENGTH)
            for side in (0, OTHER_SIDE)
        )
        rows = np.flatnonzero(which.reshape(-1) == number)
        if own.count("K") != 1 or other.count("K") != 1:
            fen = to_fen(squares[rows[:1]], np.array([-1], dtype=np.int8))[0]
            raise DataError(f"{fen}: expected one king of each colour.")
        yield own, other, rows


def write_truth(record: Record, rows: Int64s, labels: Labels) -> None:
    """Fill in value, distance and moves of these rows: the positions of `labels`, each with a legal move."""
    ranks = rank(labels.distance)
    starts = np.searchsorted(labels.row, np.arange(len(rows)))
    best = np.maximum.reduceat(ranks, starts)
    row, slot = rows[labels.row], np.arange(len(labels.row)) - starts[labels.row]
    record["moves"][row, slot] = labels.number
    record["outcomes"][row, slot] = outcome(labels.distance)
    record["best"][row, slot] = ranks == best[labels.row]
    values = value(labels.wdl)
    record["value"][rows] = values
    record["dtz"][rows] = np.where(values == DRAW, 0, labels.dtz)
