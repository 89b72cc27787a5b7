"""Exact truth of endgame positions: random ones by number, or given ones, as records (record.py).

Endings of up to four men are answered from whole arrays (resolved.py), larger ones, and positions with en passant,
one by one from the tables (probing.py), and three men without any tables from arrays solved here (retrograde.py).

Row i of `PositionSource.make` depends on (specification, seed, indices[i]) alone: it is the same whoever makes it and
in whatever batches.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import from_fen, to_fen
from manyhands.tasks.chess_endgames.children import Arrays
from manyhands.tasks.chess_endgames.labelling import label
from manyhands.tasks.chess_endgames.moves import Int64s, Men, has_move, is_legal
from manyhands.tasks.chess_endgames.pieces import (
    Specification,
    check_tables,
    most_moves,
    needed_tables,
    parse,
)
from manyhands.tasks.chess_endgames.positions import draw
from manyhands.tasks.chess_endgames.probing import Prober
from manyhands.tasks.chess_endgames.record import (
    Column,
    Record,
    by_pieces,
    columns,
    empty_record,
    men_of,
    place,
    write_truth,
)
from manyhands.tasks.chess_endgames.resolved import MOST_MEN, Resolved
from manyhands.tasks.chess_endgames.retrograde import MOST_MEN as SOLVED_MEN
from manyhands.tasks.chess_endgames.retrograde import Solved

__all__ = [
    "PositionSource",
    "Record",
    "Truth",
    "columns",
    "from_fen",
    "open_source",
    "open_truth",
    "place",
    "to_fen",
]


log = logging.getLogger(__name__)


class Truth:
    """Labels positions: those of few men from whole arrays, the others one by one from the tables."""

    def __init__(self, arrays: Arrays, most_men: int, tables: Path | None) -> None:
        self._arrays = arrays
        self._most_men = most_men
        self._tables = tables
        self._prober: Prober | None = None

    def label(
        self, squares: npt.NDArray[np.uint8], en_passant: npt.NDArray[np.int8], *, moves: int | None = None
    ) -> Record:
        """The record of given positions (uint8 [N, 64], int8 [N]); `moves` columns, by default as many as the
        pieces that are there can need. Raises DataError for positions that are not legal or have no legal move, and
        where tables are missing."""
        groups = list(by_pieces(squares))
        needed = max((most_moves(own, other) for own, other, _ in groups), default=0)
        record = empty_record(len(squares), needed if moves is None else moves)
        record["squares"][:] = squares
        record["en_passant"][:] = en_passant
        for own, other, rows in groups:
            probed = en_passant[rows] >= 0
            if not self._has_array(own, other):
                probed[:] = True
            self._probe(record, rows[probed])
            men = men_of(own, other, squares[rows[~probed]])
            _check(men, squares[rows[~probed]])
            self.label_men(record, rows[~probed], men)
        return record

    def label_men(self, record: Record, rows: Int64s, men: Men) -> None:
        """Fill in these rows of a record, whose squares are written, for legal positions with a legal move."""
        if not self._has_array(men.own, men.other):
            self._probe(record, rows)
        elif len(rows):
            write_truth(record, rows, label(men, self._arrays))

    def _has_array(self, own: str, other: str) -> bool:
        return len(own) + len(other) <= self._most_men

    def _probe(self, record: Record, rows: Int64s) -> None:
        for row in rows.tolist():
            codes, behind = record["squares"][row], int(record["en_passant"][row])
            if self._tables is None:
                raise DataError(
                    f"{_fen_of(codes, behind)}: without tables, only positions of up to {self._most_men} men without "
                    "en passant have a truth. Name a directory of Syzygy tables."
                )
            if self._prober is None:
                self._prober = Prober(self._tables)
            write_truth(record, np.array([row]), self._prober.probe(codes.tolist(), behind))


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
        record = empty_record(len(indices), self.specification.moves)
        for rows, men in draw(self.specification, indices, seed):
            place(record["squares"], rows, men)
            self.truth.label_men(record, rows, men)
        return record


def open_source(pieces: str, syzygy: Path | None) -> PositionSource:
    """Positions by specification (pieces.py), their truth from a directory of Syzygy tables, or solved here for up to
    three men where there is none. Raises DataError for an impossible specification, and one that names the table
    files that are missing."""
    specification = parse(pieces)
    check_source(specification, syzygy)
    for one in specification.endings:
        if one.men > MOST_MEN:
            log.warning(
                "%s has %d men: its positions are probed one by one (hundreds a second for each process); up to %d "
                "men are looked up in decoded tables, which is hundreds of times faster",
                one.table,
                one.men,
                MOST_MEN,
            )
    return PositionSource(specification=specification, truth=open_truth(syzygy))


def check_source(specification: Specification, syzygy: Path | None) -> None:
    """Raises DataError where the truth of these endings is not to be had: the table files that are missing."""
    if syzygy is not None:
        check_tables(specification.endings, syzygy)
    else:
        _check_solvable(specification)


def open_truth(syzygy: Path | None) -> Truth:
    """Truth of any position that the directory has tables for; of up to three men without one."""
    if syzygy is None:
        return Truth(Solved(), SOLVED_MEN, None)
    return Truth(Resolved(syzygy), MOST_MEN, syzygy)


def _check(men: Men, squares: npt.NDArray[np.uint8]) -> None:
    """Raises DataError for the first position that has no truth."""
    wrong = np.flatnonzero(~is_legal(men))
    if wrong.size:
        raise DataError(
            f"{_fen_of(squares[wrong[0]])} is not a legal position: the side that is not to move is in check, or a "
            "pawn stands on the first or last rank."
        )
    over = np.flatnonzero(~has_move(men))
    if over.size:
        raise DataError(f"{_fen_of(squares[over[0]])} has no legal move: the game is over there.")


def _check_solvable(specification: Specification) -> None:
    large = [one for one in specification.endings if one.men > SOLVED_MEN]
    if large:
        names = ", ".join(sorted({name for one in large for name in needed_tables(one)}))
        raise DataError(
            f"{specification.text} has more than {SOLVED_MEN} men, whose truth is only known from Syzygy tables: "
            f"{names}. Any mirror of the Syzygy tables has them: name the directory they are in "
            "(task.syzygy=DIR, or --syzygy DIR)."
        )


def _fen_of(codes: npt.NDArray[np.uint8], behind: int = -1) -> str:
    return to_fen(codes[None], np.array([behind], dtype=np.int8))[0]
