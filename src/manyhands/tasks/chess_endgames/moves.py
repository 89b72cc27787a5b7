"""Legal moves of many positions with the same pieces at once, in numpy.

A batch of positions is a `Men`: the letters of the mover's and of the opponent's pieces, and their squares (int64,
one column a piece, in boards.py's view of the mover). Sets of squares are uint64 bitboards. There is no castling,
and no en passant (positions with it are probing.py's).

Legality is decided by the rules alone: after the move, does an opponent's piece attack the mover's king?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

PROMOTIONS = "NBRQ"
"""By a move's promotion, less one."""

_KING = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
_KNIGHT = [(1, 2), (2, 1), (2, -1), (1, -2), (-1, -2), (-2, -1), (-2, 1), (-1, 2)]
SLIDERS = {"R": _KING[0::2], "B": _KING[1::2], "Q": _KING}
_ONE = np.uint64(1)


@dataclass(frozen=True, kw_only=True)
class Men:
    """Positions with the same pieces. `own` and `other` are letters of KQRBNP with the king first."""

    own: str
    other: str
    own_squares: Int64s
    """[N, len(own)]"""
    other_squares: Int64s
    """[N, len(other)]"""

    def __len__(self) -> int:
        return len(self.own_squares)

    def rows(self, chosen: npt.NDArray[np.intp] | Bools) -> Men:
        """Some of the positions; each piece's squares lie together in memory."""
        return Men(
            own=self.own,
            other=self.other,
            own_squares=self.own_squares.T[:, chosen].T,
            other_squares=self.other_squares.T[:, chosen].T,
        )


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Legal moves of a batch, by row and then by number; all int64 [L]."""

    row: Int64s
    number: Int64s
    """from + 64 * to + 4096 * promotion (0 none, 1 N, 2 B, 3 R, 4 Q): the record's."""
    piece: Int64s
    """Which of the mover's."""
    captured: Int64s
    """Which of the opponent's, or -1."""

    @property
    def origin(self) -> Int64s:
        return self.number & 63

    @property
    def target(self) -> Int64s:
        return (self.number >> 6) & 63

    @property
    def promotion(self) -> Int64s:
        return self.number >> 12


def legal_moves(men: Men) -> Moves:
    """All legal moves of positions that are legal themselves (`is_legal`)."""
    own_set, other_set = occupied_by(men.own_squares), occupied_by(men.other_squares)
    parts = []
    for column, letter in enumerate(men.own):
        origin = men.own_squares[:, column]
        if letter == "P":
            row, target = _pawn_targets(origin, own_set, other_set)
        else:
            row, target = _piece_targets(letter, origin, own_set, other_set)
        parts.append((row, origin[row] + 64 * target, np.full(len(row), column)))
    row, number, piece = (np.concatenate(fields) for fields in zip(*parts, strict=True))
    safe = ~_leaves_king_attacked(men, row, number, piece, own_set | other_set)
    row, number, piece = row[safe], number[safe], piece[safe]
    captured = _captured(men, row, number >> 6)
    return _in_order(*_with_promotions(men, row, number, piece, captured))


def is_legal(men: Men) -> Bools:
    """[N]: the pieces stand on distinct squares, no pawn on the first or last rank, and the side that is not to
    move is not in check."""
    both = np.concatenate([men.own_squares, men.other_squares], axis=1)
    occupied = np.zeros(len(men), dtype=np.uint64)
    legal = np.ones(len(men), dtype=np.bool_)
    for letter, column in zip(men.own + men.other, both.T, strict=True):
        legal &= ~has(occupied, column)
        occupied |= bit(column)
        if letter == "P":
            legal &= (column >= 8) & (column < 56)
    king = men.other_squares[:, 0]
    for letter, column in zip(men.own, men.own_squares.T, strict=True):
        legal &= ~attacks(letter, column, king, occupied, up=True)
    return legal


def in_check(men: Men) -> Bools:
    """[N]: the mover's king is attacked."""
    occupied = occupied_by(men.own_squares) | occupied_by(men.other_squares)
    king = men.own_squares[:, 0]
    check = np.zeros(len(men), dtype=np.bool_)
    for letter, column in zip(men.other, men.other_squares.T, strict=True):
        check |= attacks(letter, column, king, occupied, up=False)
    return check


def has_move(men: Men) -> Bools:
    """[N]: legal positions where the mover is neither mated nor stalemated."""
    return np.bincount(legal_moves(men).row, minlength=len(men)) > 0


def attacks(letter: str, square: Int64s, target: Int64s, occupied: UInt64s, *, up: bool) -> Bools:
    """Does the piece on `square` attack `target`? `up`: its pawns move towards the eighth rank."""
    table = _REACH["P" if up else "p"] if letter == "P" else _REACH[letter]
    hit = has(table[square], target)
    if letter in SLIDERS:
        hit &= (BETWEEN[square, target] & occupied) == 0
    return hit


def _piece_targets(
    letter: str, origin: Int64s, own_set: UInt64s, other_set: UInt64s
) -> tuple[Int64s, Int64s]:
    targets = TARGETS[letter][origin]
    free = (targets >= 0) & ~has(own_set[:, None], targets & 63)
    if letter in SLIDERS:
        occupied = (own_set | other_set)[:, None]
        free &= (BETWEEN[origin[:, None], targets & 63] & occupied) == 0
    row, slot = np.nonzero(free)
    return row, targets[row, slot]


def _pawn_targets(origin: Int64s, own_set: UInt64s, other_set: UInt64s) -> tuple[Int64s, Int64s]:
    empty = ~(own_set | other_set)
    one = has(empty, origin + 8)
    two = one & (origin < 16) & has(empty, np.minimum(origin + 16, 63))
    left = (origin % 8 > 0) & has(other_set, origin + 7)
    right = (origin % 8 < 7) & has(other_set, np.minimum(origin + 9, 63))
    parts = [(np.flatnonzero(free), step) for free, step in ((one, 8), (two, 16), (left, 7), (right, 9))]
    row = np.concatenate([rows for rows, _ in parts])
    return row, np.concatenate([origin[rows] + step for rows, step in parts])


def _leaves_king_attacked(men: Men, row: Int64s, number: Int64s, piece: Int64s, occupied: UInt64s) -> Bools:
    origin, target = number & 63, number >> 6
    king = np.where(piece == 0, target, men.own_squares[row, 0])
    after = (occupied[row] & ~bit(origin)) | bit(target)
    attacked = np.zeros(len(row), dtype=np.bool_)
    for letter, column in zip(men.other, men.other_squares.T, strict=True):
        square = column[row]
        attacked |= attacks(letter, square, king, after, up=False) & (square != target)
    return attacked


def _captured(men: Men, row: Int64s, target: Int64s) -> Int64s:
    captured = np.full(len(row), -1)
    for index, column in enumerate(men.other_squares.T):
        captured[column[row] == target] = index
    return captured


def _with_promotions(
    men: Men, row: Int64s, number: Int64s, piece: Int64s, captured: Int64s
) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """A pawn's move to the last rank becomes four."""
    if "P" not in men.own:
        return row, number, piece, captured
    pawns = np.array([letter == "P" for letter in men.own])
    last = pawns[piece] & (number >> 6 >= 56)
    kept, chosen = np.flatnonzero(~last), np.repeat(np.flatnonzero(last), len(PROMOTIONS))
    promotion = np.tile(np.arange(1, len(PROMOTIONS) + 1), len(chosen) // len(PROMOTIONS))
    order = np.concatenate([kept, chosen])
    numbers = np.concatenate([number[kept], number[chosen] + 4096 * promotion])
    return row[order], numbers, piece[order], captured[order]


def _in_order(row: Int64s, number: Int64s, piece: Int64s, captured: Int64s) -> Moves:
    """Sorted by one key that holds all four: row, 15 bits of number, 4 of piece, 4 of captured + 1."""
    key = np.sort(((row << 15 | number) << 4 | piece) << 4 | (captured + 1))
    return Moves(row=key >> 23, number=key >> 8 & 0x7FFF, piece=key >> 4 & 15, captured=(key & 15) - 1)


def occupied_by(squares: Int64s) -> UInt64s:
    sets = np.zeros(len(squares), dtype=np.uint64)
    for column in squares.T:
        sets |= bit(column)
    return sets


def bit(squares: Int64s) -> UInt64s:
    """The bitboard of each square by itself."""
    sets: UInt64s = _ONE << squares.astype(np.uint64)
    return sets


def has(sets: UInt64s, squares: Int64s) -> Bools:
    return (sets >> squares.astype(np.uint64) & _ONE).astype(np.bool_)


def _walk(square: int, steps: list[tuple[int, int]], reach: int) -> list[int]:
    found = []
    for right, up in steps:
        file, rank = square % 8 + right, square // 8 + up
        for _ in range(reach):
            if not (0 <= file < 8 and 0 <= rank < 8):
                break
            found.append(file + 8 * rank)
            file, rank = file + right, rank + up
    return found


def _targets() -> dict[str, Int64s]:
    """By letter: [64, most targets], padded with -1."""
    steps = {"K": (_KING, 1), "N": (_KNIGHT, 1), **{k: (v, 7) for k, v in SLIDERS.items()}}
    tables = {}
    for letter, (directions, reach) in steps.items():
        lists = [_walk(square, directions, reach) for square in range(64)]
        width = max(len(found) for found in lists)
        tables[letter] = np.array([found + [-1] * (width - len(found)) for found in lists])
    return tables


def _reach() -> dict[str, UInt64s]:
    """By letter: [64], what a piece alone on the board attacks; P goes up, p down."""
    lists = {
        letter: [[int(t) for t in row if t >= 0] for row in table.tolist()]
        for letter, table in TARGETS.items()
    }
    lists["P"] = [_walk(square, [(-1, 1), (1, 1)], 1) for square in range(64)]
    lists["p"] = [_walk(square, [(-1, -1), (1, -1)], 1) for square in range(64)]
    return {
        letter: np.array([sum(1 << t for t in found) for found in table], dtype=np.uint64)
        for letter, table in lists.items()
    }


def _between() -> UInt64s:
    """[64, 64]: the squares strictly between two of a rank, file or diagonal; nothing for others."""
    table = np.zeros((64, 64), dtype=np.uint64)
    for square in range(64):
        for direction in _KING:
            passed = 0
            for target in _walk(square, [direction], 7):
                table[square, target] = passed
                passed |= 1 << target
    return table


TARGETS = _targets()
_REACH = _reach()
BETWEEN = _between()
