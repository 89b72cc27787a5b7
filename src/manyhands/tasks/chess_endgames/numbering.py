"""From positions to places in a Syzygy table: the numbering of the published format.

A table lists its pieces in an order of its own and puts them into groups. The leading group uses the board's
symmetry: three different pieces, the two kings, or the pawns of the leading colour, one part of the table for each
file a to d of their leading pawn. Every further group of k equal pieces is numbered as a combination of k of the
squares that the groups before it leave. A position's place is the sum of each group's number times its factor.

Facts from the format that Ronald de Man published with his generator and probing code (2013, free for any use),
as documented at https://www.chessprogramming.org/Syzygy_Bases and by other programs that probe the tables.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from manyhands.tasks.chess_endgames.moves import Int64s

_THREE, _KINGS = 31332, 462
"""Placements of three different pieces, and of two kings, that the board's symmetry does not make equal."""


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """Of one part of a table: its pieces (codes of the file) in its order, their groups, and the groups' factors."""

    pieces: tuple[int, ...]
    groups: tuple[int, ...]
    """Sizes, in the order of the pieces; the first one is the leading group."""
    pawn_groups: int
    """How many of the groups are pawns: 0, 1 or 2."""
    factors: tuple[int, ...]
    size: int

    def index(self, squares: Int64s) -> Int64s:
        """Places (int64 [N]) of positions: squares int64 [len(pieces), N], by the table's order of pieces. With
        pawns, the leading pawn (`leading_pawn_first`) is on the file of this part, or on its mirror image."""
        lead = self.groups[0]
        if self.pawn_groups:
            squares = squares ^ np.where(squares[0] & 4, 7, 0)
            place = _leading_pawns(squares[:lead])
        else:
            squares = _folded(squares, lead)
            place = _three_pieces(squares) if lead == 3 else _KING_PAIRS[_TRIANGLE[squares[0]], squares[1]]
        place = place * self.factors[0]
        start = lead
        for number, count in enumerate(self.groups[1:], start=1):
            first_square = 8 if number < self.pawn_groups else 0
            group = np.sort(squares[start : start + count], axis=0)
            place += self.factors[number] * _combination(group, squares[:start], first_square)
            start += count
        return place


def numbering(
    pieces: tuple[int, ...], pawns: tuple[int, int], order: tuple[int, int], file: int
) -> Numbering:
    """`pawns`: how many the leading and the other colour has. `order`: at which turns the leading group's and the
    other colour's pawns' factors are given out. `file`: of the leading pawn, 0 to 3."""
    pawn_groups = sum(count > 0 for count in pawns)
    groups = [count for count in pawns if count] if pawn_groups else [_leading_pieces(pieces)]
    while sum(groups) < len(pieces):
        rest = pieces[sum(groups) :]
        groups.append(next((n for n, piece in enumerate(rest) if piece != rest[0]), len(rest)))
    sizes = [_lead_size(groups[0], pawn_groups > 0, file)]
    free = 64 - sum(groups[: max(1, pawn_groups)])
    for number, count in enumerate(groups[1:], start=1):
        if number < pawn_groups:
            sizes.append(math.comb(48 - groups[0], count))
        else:
            sizes.append(math.comb(free, count))
            free -= count
    turns = list(range(max(1, pawn_groups), len(groups)))
    for group in sorted(range(max(1, pawn_groups)), key=lambda group: order[group]):
        turns.insert(order[group], group)
    factors, factor = [0] * len(groups), 1
    for group in turns:
        factors[group] = factor
        factor *= sizes[group]
    return Numbering(
        pieces=pieces, groups=tuple(groups), pawn_groups=pawn_groups, factors=tuple(factors), size=factor
    )


def leading_pawn_first(pawns: Int64s) -> tuple[Int64s, Int64s]:
    """Order the leading colour's pawns ([count, N]) so that the leading one, nearest to the edge and then to the
    first rank, comes first; also its file, 0 to 3 (mirrored)."""
    first = np.argmin(_PAWN_NUMBER[pawns] * 64 + pawns, axis=0)
    ordered = pawns.copy()
    columns = np.arange(pawns.shape[1])
    ordered[first, columns] = pawns[0]
    ordered[0] = pawns[first, columns]
    file = ordered[0] & 7
    return ordered, np.minimum(file, 7 - file)


def _leading_pieces(pieces: tuple[int, ...]) -> int:
    """Three, where three pieces are the only one of their kind; else the two kings."""
    return 3 if sum(pieces.count(piece) == 1 for piece in pieces) >= 3 else 2


def _lead_size(count: int, of_pawns: bool, file: int) -> int:
    if of_pawns:
        return int(_pawn_sets(count)[6 * file : 6 * file + 6].sum())
    return _THREE if count == 3 else _KINGS


def _folded(squares: Int64s, lead: int) -> Int64s:
    """The first piece on files a to d and ranks 1 to 4; the first of the leading group that is not on the long
    diagonal a1-h8 below it."""
    squares = squares ^ np.where(squares[0] & 4, 7, 0)
    squares ^= np.where(squares[0] & 32, 56, 0)
    side = _off_diagonal(squares[0])
    for square in squares[1:lead]:
        side = np.where(side == 0, _off_diagonal(square), side)
    return np.where(side > 0, (squares >> 3 | squares << 3) & 63, squares)


def _off_diagonal(squares: Int64s) -> Int64s:
    """Above 0 above the long diagonal, 0 on it."""
    return (squares >> 3) - (squares & 7)


def _three_pieces(squares: Int64s) -> Int64s:
    """Number of the first three: first on the triangle below the diagonal, then those with it on the diagonal, by how
    many follow it there."""
    a, b, c = squares[:3]
    after_a = (b > a).astype(np.int64)
    after_ab = (c > a).astype(np.int64) + (c > b)
    a_diagonal, b_diagonal, c_diagonal = a & 7, b & 7, c & 7
    off = _TRIANGLE[a] * 63 * 62 + (b - after_a) * 62 + c - after_ab
    on_a = 6 * 63 * 62 + a_diagonal * 28 * 62 + _BELOW[b] * 62 + c - after_ab
    start = 6 * 63 * 62 + 4 * 28 * 62
    on_ab = start + a_diagonal * 7 * 28 + (b_diagonal - after_a) * 28 + _BELOW[c]
    start += 4 * 7 * 28
    on_abc = start + a_diagonal * 7 * 6 + (b_diagonal - after_a) * 6 + c_diagonal - after_ab
    where = [_off_diagonal(a) != 0, _off_diagonal(b) != 0, _off_diagonal(c) != 0]
    return np.select(where, [off, on_a, on_ab], on_abc)


def _leading_pawns(pawns: Int64s) -> Int64s:
    """Number of the leading pawns within the part of the leading one's file: [count, N], the leading one first."""
    others = len(pawns) - 1
    sets = _pawn_sets(len(pawns)).reshape(4, 6)
    before = np.concatenate(
        [np.zeros((4, 1), dtype=np.int64), np.cumsum(sets, axis=1)[:, :-1]], axis=1
    ).ravel()
    place: Int64s = before[_PAWN_NUMBER[pawns[0]]]
    if others:
        ranks = np.sort(_PAWN_RANK[pawns[1:]], axis=0)
        place = place + sum(_CHOOSE[count + 1][ranks[count]] for count in range(others))
    return place


def _combination(group: Int64s, before: Int64s, first_square: int) -> Int64s:
    """Number of a set of squares ([count, N], ascending) among those that `before` leaves."""
    place = np.zeros(group.shape[1], dtype=np.int64)
    for number, square in enumerate(group):
        passed = sum((square > other).astype(np.int64) for other in before)
        # a piece on another's square belongs to no position: any number within bounds will do
        place += _CHOOSE[number + 1][np.maximum(square - passed - first_square, 0)]
    return place


def _pawn_sets(count: int) -> Int64s:
    """[24] by number of the leading pawn: the sets of count - 1 pawns that it leads."""
    lead = np.array([8 * (1 + n % 6) + n // 6 for n in range(24)])
    sets: Int64s = _CHOOSE[count - 1][_PAWN_RANK[lead]]
    return sets


def _pawn_number() -> Int64s:
    """[64]: files from the edge inwards, then ranks; alike for mirror images."""
    squares = np.arange(64)
    file, rank = squares & 7, squares >> 3
    numbers: Int64s = np.clip(np.minimum(file, 7 - file) * 6 + rank - 1, 0, 23)
    return numbers


def _pawn_rank() -> Int64s:
    """[64]: how many squares a pawn may stand on that a pawn here would lead: files a, h, b, g, ... from the lowest
    rank of each pair of files."""
    squares = np.arange(64)
    file, rank = squares & 7, squares >> 3
    edge = np.minimum(file, 7 - file)
    ranks: Int64s = np.clip(47 - 12 * edge - 2 * (rank - 1) - (file > 3), 0, 47)
    return ranks


def _triangle() -> Int64s:
    """[64]: the squares a1-d1-d4, those below the diagonal first; 0 elsewhere."""
    table = np.zeros(64, dtype=np.int64)
    below = [file + 8 * rank for rank in range(4) for file in range(rank + 1, 4)]
    for number, square in enumerate(below + [9 * n for n in range(4)]):
        table[square] = number
    return table


def _below() -> Int64s:
    """[64]: the 28 squares below the long diagonal in their order; 0 elsewhere."""
    table = np.zeros(64, dtype=np.int64)
    for number, square in enumerate(file + 8 * rank for rank in range(8) for file in range(rank + 1, 8)):
        table[square] = number
    return table


def _king_pairs() -> Int64s:
    """[10, 64]: 462 placements of two kings, first on the triangle; those with both on the diagonal come last. 0 for
    what is none."""
    table = np.zeros((10, 64), dtype=np.int64)
    apart, diagonal = [], []
    for first in range(10):
        square = int(np.flatnonzero((first == _TRIANGLE) & _IN_TRIANGLE)[0])
        for other in range(64):
            if max(abs(square % 8 - other % 8), abs(square // 8 - other // 8)) < 2:
                continue
            above = other // 8 - other % 8
            if first < 6 or above < 0:
                apart.append((first, other))
            elif above == 0:
                diagonal.append((first, other))
    for number, pair in enumerate(apart + diagonal):
        table[pair] = number
    return table


_CHOOSE = np.array([[math.comb(n, k) for n in range(64)] for k in range(8)], dtype=np.int64)
_PAWN_NUMBER = _pawn_number()
_PAWN_RANK = _pawn_rank()
_TRIANGLE = _triangle()
_IN_TRIANGLE = np.array([s % 8 < 4 and s // 8 <= s % 8 for s in range(64)])
_BELOW = _below()
_KING_PAIRS = _king_pairs()
