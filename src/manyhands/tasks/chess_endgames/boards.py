"""Boards as rows of numbers, seen from the side to move.

When Black is to move the board is turned upside down (square ^ 56) and the colours are exchanged, so that the
mover is always "White" and its pawns go up. Squares count a1 = 0, b1 = 1, ..., h8 = 63. A row is 64 codes:

    0 empty    1..6 the mover's P N B R Q K    7..12 the opponent's P N B R Q K

and the square behind a pawn that has just moved two (-1: none). A FEN's other colour, its counters and its move
number are not kept; castling rights are refused, because the tables know none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError

UInt8s = npt.NDArray[np.uint8]
Int8s = npt.NDArray[np.int8]

LETTERS = ".PNBRQKpnbrqk"
"""By code, the mover as White."""
OTHER_SIDE = 6
"""Added to a code of the mover's, it is the opponent's."""


def from_fen(fens: Iterable[str]) -> tuple[UInt8s, Int8s]:
    """squares uint8 [N, 64] and en_passant int8 [N] of positions in Forsyth-Edwards notation.

    Only the first two fields need be there. Raises DataError for what is no such position; whether it is legal
    is not judged here.
    """
    rows = [_row(fen) for fen in fens]
    squares = np.array([codes for codes, _ in rows], dtype=np.uint8).reshape(len(rows), 64)
    return squares, np.array([square for _, square in rows], dtype=np.int8)


def to_fen(squares: UInt8s, en_passant: Int8s) -> list[str]:
    """The positions with the mover as White, whatever colour it had."""
    return [_fen(row, behind) for row, behind in zip(squares.tolist(), en_passant.tolist(), strict=True)]


def side_pieces(row: Sequence[int]) -> tuple[str, str]:
    """The letters of the mover's pieces and of the opponent's, in the order of their squares."""
    own = "".join(LETTERS[code] for code in row if 0 < code <= OTHER_SIDE)
    return own, "".join(LETTERS[code].upper() for code in row if code > OTHER_SIDE)


def _row(fen: str) -> tuple[list[int], int]:
    fields = fen.split()
    if len(fields) < 2 or fields[1] not in ("w", "b"):
        raise _not_a_position(fen, "expected pieces, then w or b")
    ranks = [_rank(text, fen) for text in fields[0].split("/")]
    if len(ranks) != 8:
        raise _not_a_position(fen, f"{len(ranks)} ranks instead of 8")
    if len(fields) > 2 and fields[2] != "-":
        raise _not_a_position(
            fen, f"castling rights '{fields[2]}', which endgame tables do not know: expected -"
        )
    codes = [code for rank in reversed(ranks) for code in rank]
    square = _square(fields[3], fen) if len(fields) > 3 and fields[3] != "-" else -1
    if fields[1] == "b":
        codes = [_other(code) for rank in ranks for code in rank]
        square = square ^ 56 if square >= 0 else -1
    if square >= 0 and not _just_passed(codes, square):
        raise _not_a_position(fen, f"the en passant square '{fields[3]}' is behind no pawn that moved two")
    return codes, square


def _rank(text: str, fen: str) -> list[int]:
    codes: list[int] = []
    for letter in text:
        if letter in "12345678":
            codes += [0] * int(letter)
        elif letter in LETTERS[1:]:
            codes.append(LETTERS.index(letter))
        else:
            raise _not_a_position(fen, f"'{letter}' is no piece")
    if len(codes) != 8:
        raise _not_a_position(fen, f"rank '{text}' has {len(codes)} squares instead of 8")
    return codes


def _square(name: str, fen: str) -> int:
    if len(name) != 2 or name[0] not in "abcdefgh" or name[1] not in "36":
        raise _not_a_position(fen, f"'{name}' is no en passant square")
    return "abcdefgh".index(name[0]) + 8 * (int(name[1]) - 1)


def _just_passed(codes: list[int], square: int) -> bool:
    pawn = LETTERS.index("p")
    return 40 <= square < 48 and codes[square - 8] == pawn and codes[square] == codes[square + 8] == 0


def _other(code: int) -> int:
    if code == 0:
        return 0
    return code + OTHER_SIDE if code <= OTHER_SIDE else code - OTHER_SIDE


def _fen(row: list[int], behind: int) -> str:
    ranks = []
    for start in range(56, -1, -8):
        text, empty = "", 0
        for code in row[start : start + 8]:
            if code == 0:
                empty += 1
                continue
            text += (str(empty) if empty else "") + LETTERS[code]
            empty = 0
        ranks.append(text + (str(empty) if empty else ""))
    square = "-" if behind < 0 else "abcdefgh"[behind % 8] + str(behind // 8 + 1)
    return f"{'/'.join(ranks)} w - {square} 0 1"


def _not_a_position(fen: str, why: str) -> DataError:
    return DataError(
        f"'{fen}' is not a position in Forsyth-Edwards notation: {why}. One reads like "
        "'8/8/8/4k3/8/8/4P3/4K3 w - - 0 1'."
    )
