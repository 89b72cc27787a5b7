"""From a decoded Syzygy file to the truth of every position of an ending (what the arrays hold: children.py).

Every position is worked on with the mover's king on the squares that the board's symmetry leaves (files a to d with
pawns, the triangle a1-d1-d4 without), and copied to its mirror images.

A move is legal where the position after it is: where the mover's king could be taken, the smaller ending's array says
UNREACHABLE. So captures and promotions, which are looked up there, need no other check.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from manyhands.tasks.chess_endgames.children import (
    MATED,
    NO_VALUE,
    UNREACHABLE,
    Distances,
    Values,
    ValuesOf,
    after_move,
    dense_index,
    value_before,
    with_en_passant,
)
from manyhands.tasks.chess_endgames.distances import before_zeroing
from manyhands.tasks.chess_endgames.moves import (
    BETWEEN,
    SLIDERS,
    TARGETS,
    Int64s,
    Men,
    attacks,
    has,
    has_move,
    in_check,
    is_legal,
    occupied_by,
)
from manyhands.tasks.chess_endgames.numbering import leading_pawn_first
from manyhands.tasks.chess_endgames.pieces import ending
from manyhands.tasks.chess_endgames.syzygy import Part, Table

_UNKNOWN = -32768

_FIRST_BLACK = 8
_CHUNK = 1 << 15


def resolve_values(own: str, other: str, table: Table | None, values_of: ValuesOf) -> Values:
    """int8, flat; `values_of` answers for what captures lead to. No table: two kings alone."""

    def fill(men: Men) -> npt.NDArray[np.int64]:
        found = np.zeros(len(men), dtype=np.int64)
        if table is None:
            return found
        for rows, part, place in places(table, men):
            found[rows] = part.stored[place].astype(np.int64) - 2
        return np.maximum(found, _best_zeroing(men, values_of, pawn_moves=False))

    whole = np.full((64,) * (len(own) + len(other)), UNREACHABLE, dtype=np.int8)
    for chunk, legal, men in _chunks(own, other, whole):
        chunk[legal] = fill(men)
    _copy_to_images(whole, "P" in own + other)
    return whole.reshape(-1)


def resolve_distances(
    sides: tuple[tuple[str, str], ...], table: Table, values_of: ValuesOf
) -> tuple[Distances, ...]:
    """int16, flat, of each side of an ending: first what the file stores for it, then what one ply of search finds
    in what it stores for the other side. Raises ValueError or IndexError for a file that contradicts the values."""
    pawns = "P" in sides[0][0] + sides[0][1]
    arrays = []
    for own, other in sides:
        whole = np.full((64,) * (len(own) + len(other)), _UNKNOWN, dtype=np.int16)
        for chunk, legal, men in _chunks(own, other, whole):
            chunk[legal] = _stored_distances(men, table, values_of)
        _copy_to_images(whole, pawns)
        arrays.append(whole)
    if len(sides) == 1:
        return (arrays[0].reshape(-1),)
    stored = [whole.reshape(-1).copy() for whole in arrays]
    for (own, other), whole, answers in zip(sides, arrays, reversed(stored), strict=True):
        for chunk, legal, men in _chunks(own, other, whole):
            asked = legal[chunk[legal] == _UNKNOWN]
            if asked.size:
                rows = np.searchsorted(legal, asked)
                chunk[asked] = _searched_distances(men.rows(rows), values_of, answers)
        _copy_to_images(whole, pawns)
    return tuple(whole.reshape(-1) for whole in arrays)


def _stored_distances(men: Men, table: Table, values_of: ValuesOf) -> Int64s:
    """_UNKNOWN where the other side's distances are stored."""
    wdl = values_of(men.own, men.other)[dense_index(men)].astype(np.int64)
    found = before_zeroing(wdl)
    won = np.flatnonzero(wdl > 0)
    at_once = _best_zeroing(men.rows(won), values_of, pawn_moves=True) == wdl[won]
    looked_up = wdl < 0
    looked_up[won[~at_once]] = True
    counted = np.flatnonzero(looked_up)
    men, wdl = men.rows(counted), wdl[counted]
    distances = np.full(len(men), _UNKNOWN, dtype=np.int64)
    for rows, part, place in places(table, men):
        if men.own == men.other or part.black_to_move == _mover_is_black(men):
            distances[rows] = before_zeroing(wdl[rows]) + np.sign(wdl[rows]) * part.distance(place, wdl[rows])
    distances[_mated(men, distances)] = MATED
    found[counted] = distances
    return found


def _searched_distances(men: Men, values_of: ValuesOf, answers: Distances) -> Int64s:
    """Best of the pieces' quiet moves; a loss that has none is before a capture or pawn move."""
    wdl = values_of(men.own, men.other)[dense_index(men)].astype(np.int64)
    occupied = occupied_by(men.own_squares) | occupied_by(men.other_squares)
    best = np.where(wdl > 0, -_UNKNOWN, before_zeroing(wdl))
    start = dense_index(after_move(men, 0, men.own_squares[:, 0]))  # nothing has moved, the other side looks
    for piece, letter in enumerate(men.own):
        if letter == "P":
            continue
        origin = men.own_squares[:, piece]
        shift = 6 * (len(men.own) - 1 - piece)
        for target in TARGETS[letter][origin].T:
            to = target & 63
            free = (target >= 0) & ~has(occupied, to)
            if letter in SLIDERS:
                free &= (BETWEEN[origin, to] & occupied) == 0
            rows = np.flatnonzero(free)
            moved = (origin[rows] ^ to[rows]) << shift  # turning the board changes both squares alike
            reply = answers[start[rows] ^ moved].astype(np.int64)
            best[rows] = np.minimum(best[rows], _distance_before(reply, wdl[rows], best[rows]))
    if (best == -_UNKNOWN).any():
        raise ValueError("a won position has no move that wins")
    best[_mated(men, best)] = MATED
    return best


def _distance_before(reply: Int64s, wdl: Int64s, otherwise: Int64s) -> Int64s:
    """The mover's distance when the opponent then has `reply`: `otherwise` where that move is not legal or gives the
    result away."""
    won = np.where(reply == MATED, 1, 1 - reply)
    keeps_win = (wdl > 0) & (reply < 0) & (reply != _UNKNOWN)
    keeps_loss = (wdl < 0) & (reply > 0)
    return np.select([keeps_win, keeps_loss], [won, -1 - reply], otherwise)


def _best_zeroing(men: Men, values_of: ValuesOf, *, pawn_moves: bool) -> Int64s:
    """The best value (-2..2) that the mover gets by a capture, or by a pawn's move where asked; else NO_VALUE."""
    best = np.full(len(men), NO_VALUE, dtype=np.int64)
    occupied = occupied_by(men.own_squares) | occupied_by(men.other_squares)

    def play(
        rows: npt.NDArray[np.intp], piece: int, target: Int64s, captured: int | None = None, two: bool = False
    ) -> None:
        last = (target >= 56) & (men.own[piece] == "P")
        for chosen, promotions in ((~last, ("",)), (last, tuple("QRBN"))):
            some = rows[chosen]
            for promotion in promotions if some.size else ():
                after = after_move(
                    men.rows(some), piece, target[chosen], promotion=promotion, captured=captured
                )
                value = value_before(after, values_of)
                if two:
                    legal = np.flatnonzero(value != NO_VALUE)
                    value[legal] = -with_en_passant(after.rows(legal), piece, -value[legal], values_of)
                best[some] = np.maximum(best[some], value)

    for piece, letter in enumerate(men.own):
        origin = men.own_squares[:, piece]
        for captured in range(1, len(men.other)):
            target = men.other_squares[:, captured]
            rows = np.flatnonzero(attacks(letter, origin, target, occupied, up=True))
            play(rows, piece, target[rows], captured)
        if pawn_moves and letter == "P":
            one = ~has(occupied, origin + 8)
            two = one & (origin < 16) & ~has(occupied, np.minimum(origin + 16, 63))
            for free, step in ((one, 8), (two, 16)):
                rows = np.flatnonzero(free)
                play(rows, piece, origin[rows] + step, two=step == 16)
    return best


def _mated(men: Men, distances: Int64s) -> npt.NDArray[np.intp]:
    """Those without a move, among the positions that are lost at once."""
    lost = np.flatnonzero(distances == -1)
    checked = lost[in_check(men.rows(lost))]
    mated: npt.NDArray[np.intp] = checked[~has_move(men.rows(checked))]
    return mated


def _mover_is_black(men: Men) -> bool:
    """In the file, where the stronger side is White."""
    return ending(men.own, men.other).strong != men.own


def places(table: Table, men: Men) -> Iterator[tuple[npt.NDArray[np.intp], Part, Int64s]]:
    """For each part of the file that has some of the positions: (their rows, the part, their places in it)."""
    black = _mover_is_black(men)
    turn = 56 if black else 0
    white, dark = (men.other, men.own) if black else (men.own, men.other)
    white_squares, dark_squares = (
        (men.other_squares, men.own_squares) if black else (men.own_squares, men.other_squares)
    )
    columns: dict[int, list[Int64s]] = {}
    for first, letters, squares in ((0, white, white_squares), (_FIRST_BLACK, dark, dark_squares)):
        for letter, column in zip(letters, squares.T, strict=True):
            code = first + "PNBRQK".index(letter) + 1
            columns.setdefault(code, []).append(column ^ turn)
    rows = np.arange(len(men))
    file = np.zeros(len(men), dtype=np.int64)
    if table.leading_pawns:
        pawns, file = leading_pawn_first(np.stack(columns[table.leading_pawns]))
        columns[table.leading_pawns] = list(pawns)
    for number, sides in enumerate(table.parts):
        part = sides[black if len(sides) == 2 else 0]
        if len(table.parts) > 1:
            rows = np.flatnonzero(file == number)
        if rows.size:
            yield rows, part, part.numbering.index(_in_table_order(part, columns, rows))


def _in_table_order(part: Part, columns: dict[int, list[Int64s]], rows: npt.NDArray[np.intp]) -> Int64s:
    pieces = part.numbering.pieces
    return np.stack([columns[code][pieces[:n].count(code)][rows] for n, code in enumerate(pieces)])


def _chunks(
    own: str, other: str, whole: npt.NDArray[np.signedinteger]
) -> Iterator[tuple[npt.NDArray[np.signedinteger], npt.NDArray[np.intp], Men]]:
    """(a flat part of the array, the places in it that are legal positions, these positions): for each square of the
    mover's king, in parts that stay in a processor's cache."""
    grid = np.indices((64,) * (len(own) + len(other) - 1)).reshape(len(own) + len(other) - 1, -1)
    for king in _kings("P" in own + other):
        for start in range(0, grid.shape[1], _CHUNK):
            part = grid[:, start : start + _CHUNK]
            squares = np.concatenate([np.full((1, part.shape[1]), king), part])
            men = Men(
                own=own, other=other, own_squares=squares[: len(own)].T, other_squares=squares[len(own) :].T
            )
            legal = np.flatnonzero(is_legal(men))
            yield whole[king].reshape(-1)[start : start + _CHUNK], legal, men.rows(legal)


def _kings(pawns: bool) -> list[int]:
    if pawns:
        return [square for square in range(64) if square % 8 < 4]
    return [square for square in range(64) if square // 8 <= square % 8 < 4]


def _copy_to_images(whole: npt.NDArray[np.signedinteger], pawns: bool) -> None:
    men = whole.ndim
    board = whole.reshape((8, 8) * men)  # rank, file of each piece
    if not pawns:
        turned = [axis ^ 1 for axis in range(2 * men - 2)]  # rank and file exchanged
        for rank in range(4):
            for file in range(rank):
                board[rank, file] = board[file, rank].transpose(turned)
    _mirror(board, 1)
    if not pawns:
        _mirror(board, 0)


def _mirror(board: npt.NDArray[np.signedinteger], axis: int) -> None:
    """Copy what is there for the lower half of the first piece's ranks (0) or files (1) to the upper half."""
    low = [slice(None)] * board.ndim
    high = list(low)
    low[axis], high[axis] = slice(3, None, -1), slice(4, None)
    for other in range(axis + 2, board.ndim, 2):
        low[other] = slice(None, None, -1)
    board[tuple(high)] = board[tuple(low)]
