"""Positions after a move, and where positions stand in an ending's array.

An array holds one side's view of an ending (Arrays): its index is the squares of the mover's pieces and then of the
opponent's, six bits each, the first piece's highest; each side's pieces are strongest first.

    values      int8   -2..2 as Syzygy has them; UNREACHABLE where that is no legal position
    distances   int16  plies to zero, signed for the mover (distances.py); MATED where the mover is; only legal
                       positions mean anything
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from manyhands.tasks.chess_endgames.moves import PROMOTIONS, Int64s, Men, Moves, has_move
from manyhands.tasks.chess_endgames.pieces import STRENGTH

Values = npt.NDArray[np.int8]
Distances = npt.NDArray[np.int16]

UNREACHABLE = -128
MATED = -30000
NO_VALUE = -3
"""Below any value: of a move that there is not."""


ValuesOf = Callable[[str, str], Values]
"""The flat array of values of (the mover's pieces, the opponent's)."""


class Arrays(Protocol):
    """Truth of whole endings, by (the mover's pieces, the opponent's); the arrays are flat and not to be written."""

    def values(self, own: str, other: str) -> Values: ...

    def distances(self, own: str, other: str) -> Distances: ...


@dataclass(frozen=True, kw_only=True)
class Followed:
    """Moves of one kind (same piece, promotion and captured piece) and the positions after them."""

    chosen: npt.NDArray[np.intp]
    """Which of the moves."""
    after: Men
    captures: bool
    pawn: int | None
    """Which of the mover's pieces it is, if a pawn."""
    same_pieces: bool
    step: Int64s
    """From square to square."""

    @property
    def zeroing(self) -> bool:
        return self.captures or self.pawn is not None


def dense_index(men: Men) -> Int64s:
    """[N]: where positions stand in a flat array of their view."""
    index = np.zeros(len(men), dtype=np.int64)
    for column in (*men.own_squares.T, *men.other_squares.T):
        index = index << 6 | column
    return index


def after_move(
    men: Men, piece: int, target: Int64s, *, promotion: str = "", captured: int | None = None
) -> Men:
    """The positions after the mover's `piece` has gone to `target` ([N]), seen by the opponent, whose move it is."""
    own = list(zip(men.own, men.own_squares.T, strict=True))
    own[piece] = (promotion or men.own[piece], target)
    other = list(zip(men.other, men.other_squares.T, strict=True))
    if captured is not None:
        del other[captured]
    own.sort(key=lambda one: STRENGTH.index(one[0]))
    other.sort(key=lambda one: STRENGTH.index(one[0]))
    return Men(
        own="".join(letter for letter, _ in other),
        other="".join(letter for letter, _ in own),
        own_squares=np.stack([column ^ 56 for _, column in other]).T,
        other_squares=np.stack([column ^ 56 for _, column in own]).T,
    )


def with_en_passant(after: Men, pushed: int, plain: Int64s, values_of: ValuesOf) -> Int64s:
    """The mover's values of positions where the opponent's piece `pushed`, a pawn, has just moved two, so that it may
    be taken en passant; `plain`: their values ([N], -2..2) if it might not."""
    behind = after.other_squares[:, pushed] + 8
    taken = np.full(len(after), NO_VALUE, dtype=np.int64)
    for piece in (number for number, letter in enumerate(after.own) if letter == "P"):
        origin = after.own_squares[:, piece]
        rows = np.flatnonzero((np.abs(origin + 8 - behind) == 1) & (origin >> 3 == (behind >> 3) - 1))
        if rows.size:
            then = after_move(after.rows(rows), piece, behind[rows], captured=pushed)
            taken[rows] = np.maximum(taken[rows], value_before(then, values_of))
    found = np.maximum(plain, taken)
    forced = np.flatnonzero((plain == 0) & (taken < 0) & (taken != NO_VALUE))
    forced = forced[~has_move(after.rows(forced))]  # else it would be stalemate
    found[forced] = taken[forced]
    return found


def value_before(after: Men, values_of: ValuesOf) -> Int64s:
    """What positions ([N], the opponent to move) are worth to who moved there; NO_VALUE where that was not legal."""
    reply = values_of(after.own, after.other)[dense_index(after)].astype(np.int64)
    return np.where(reply == UNREACHABLE, NO_VALUE, -reply)


def follow(men: Men, moves: Moves) -> Iterator[Followed]:
    """The positions after all of `moves` (of `men`), kind by kind."""
    kinds = (moves.piece << 3 | moves.promotion) << 3 | (moves.captured + 1)
    order = np.argsort(kinds.astype(np.int16), kind="stable")  # sixteen bits are sorted by radix
    starts = np.flatnonzero(np.diff(kinds[order], prepend=-1))
    for chosen in np.split(order, starts[1:]) if len(order) else ():
        one = chosen[0]
        piece, promotion, captured = (
            int(moves.piece[one]),
            int(moves.promotion[one]),
            int(moves.captured[one]),
        )
        after = after_move(
            men.rows(moves.row[chosen]),
            piece,
            moves.target[chosen],
            promotion=PROMOTIONS[promotion - 1] if promotion else "",
            captured=captured if captured >= 0 else None,
        )
        yield Followed(
            chosen=chosen,
            after=after,
            captures=captured >= 0,
            same_pieces=captured < 0 and promotion == 0,
            step=moves.target[chosen] - moves.origin[chosen],
            pawn=piece if men.own[piece] == "P" else None,
        )
