"""Exact truth of endgame positions: the record that shards hold and that the task learns from.

N rows, seen from the side to move (boards.py):

    squares     uint8 [N, 64]  0 empty, 1..6 the mover's P N B R Q K, 7..12 the opponent's
    en_passant  int8 [N]       the square behind a pawn that has just moved two, or -1
    value       uint8 [N]      0 loss, 1 draw, 2 win for the mover under the 50-move rule, its count at zero
    dtz         int16 [N]      Syzygy's distance to zero in plies, above 0 for a win; 0 where the value is a draw
    moves       int16 [N, M]   legal moves, ascending, from + 64 * to + 4096 * promotion (0 none, 1 N, 2 B, 3 R,
                               4 Q); -1 behind them
    outcomes    uint8 [N, M]   0, 1, 2 for the mover after each; 255 behind them
    best        uint8 [N, M]   1 for each move that keeps the best outcome and is the best of those by distance

Cursed wins and blessed losses (the 50-move rule comes first) are draws, but a move that keeps a cursed win is
better than one that only draws, as Syzygy ranks them. Best by distance: the fewest plies to zero for a win, the
most for a loss; a move that mates, captures, or moves a pawn counts as one ply, so several moves may be best.
Some of Syzygy's tables count in moves of two plies; their distances may be one ply off.

Positions are made by number: row i of `PositionSource.make` depends on (specification, seed, indices[i]) alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import LETTERS, from_fen, side_pieces, to_fen
from manyhands.tasks.chess_endgames.moves import Int64s, Men
from manyhands.tasks.chess_endgames.pieces import Specification, check_tables, most_moves, parse
from manyhands.tasks.chess_endgames.positions import draw
from manyhands.tasks.chess_endgames.probing import WITHIN_RULE, Prober, RowTruth

__all__ = ["Column", "PositionSource", "Truth", "from_fen", "open_source", "to_fen"]

Record = dict[str, npt.NDArray[np.generic]]
Column = tuple[str, np.dtype[np.generic], tuple[int, ...]]

LOSS, DRAW, WIN = 0, 1, 2
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


class Truth:
    """Labels positions from a directory of Syzygy tables."""

    def __init__(self, syzygy: Path) -> None:
        self._prober = Prober(syzygy)

    def label(
        self, squares: npt.NDArray[np.uint8], en_passant: npt.NDArray[np.int8], *, moves: int | None = None
    ) -> Record:
        """The record of given positions (uint8 [N, 64], int8 [N]); `moves` columns, by default as many as the
        pieces that are there can need. Raises DataError for positions that are not legal, have no legal move, or
        whose tables are missing."""
        rows = squares.tolist()
        width = moves if moves is not None else max((_room(row) for row in rows), default=0)
        record = _empty(len(rows), width)
        record["squares"][:] = squares
        record["en_passant"][:] = en_passant
        for number, (row, behind) in enumerate(zip(rows, en_passant.tolist(), strict=True)):
            _fill(record, number, self._prober.probe(row, behind))
        return record


@dataclass(frozen=True, kw_only=True)
class PositionSource:
    """Random positions of a specification with their truth."""

    specification: Specification
    truth: Truth

    @property
    def columns(self) -> tuple[Column, ...]:
        return columns(self.specification.moves)

    def make(self, indices: Int64s, seed: int) -> Record:
        """The record of the positions with these numbers (int64 [N], not negative)."""
        squares = np.zeros((len(indices), 64), dtype=np.uint8)
        for rows, men in draw(self.specification, indices, seed):
            place(squares, rows, men)
        behind = np.full(len(indices), -1, dtype=np.int8)
        return self.truth.label(squares, behind, moves=self.specification.moves)


def open_source(pieces: str, syzygy: Path | None) -> PositionSource:
    """Raises DataError for an impossible specification, and one that names the table files that are missing."""
    specification = parse(pieces)
    if syzygy is None:
        raise DataError(f"{pieces}: name a directory of Syzygy tables.")
    check_tables(specification.endings, syzygy)
    return PositionSource(specification=specification, truth=Truth(syzygy))


def place(squares: npt.NDArray[np.uint8], rows: Int64s, men: Men) -> None:
    """Write the codes of `men` into these rows of `squares`."""
    for letter, column in zip(men.own, men.own_squares.T, strict=True):
        squares[rows, column] = LETTERS.index(letter)
    for letter, column in zip(men.other, men.other_squares.T, strict=True):
        squares[rows, column] = LETTERS.index(letter.lower())


def _room(row: list[int]) -> int:
    return most_moves(*side_pieces(row))


def _empty(rows: int, moves: int) -> Record:
    record: Record = {name: np.zeros((rows, *shape), dtype) for name, dtype, shape in columns(moves)}
    record["moves"][:] = NO_MOVE
    record["outcomes"][:] = NO_OUTCOME
    return record


def _fill(record: Record, number: int, truth: RowTruth) -> None:
    moves = np.array(sorted(truth.moves), dtype=np.int64)
    distances = np.array([truth.moves[move] for move in moves.tolist()], dtype=np.int64)
    ranks = rank(distances)
    record["value"][number] = {-2: LOSS, 2: WIN}.get(truth.wdl, DRAW)
    record["dtz"][number] = truth.dtz
    record["moves"][number, : len(moves)] = moves
    record["outcomes"][number, : len(moves)] = outcome(distances)
    record["best"][number, : len(moves)] = ranks == ranks.max()


def outcome(distances: Int64s) -> npt.NDArray[np.uint8]:
    """0, 1, 2 of distances to zero: within the 50-move rule, or a draw."""
    decided = np.abs(distances) <= WITHIN_RULE
    outcomes: npt.NDArray[np.uint8] = (1 + np.sign(distances) * decided).astype(np.uint8)
    return outcomes


def rank(distances: Int64s) -> Int64s:
    """The higher the better: short wins, long wins, cursed ones, draws, blessed losses, long losses, short ones."""
    ranks: Int64s = np.sign(distances) * FARTHEST - distances
    return ranks


FARTHEST = 1 << 12
"""Beyond any distance to zero."""
