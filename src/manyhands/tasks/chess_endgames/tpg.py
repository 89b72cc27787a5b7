"""Training positions of CeresTrain (TPG files) as records, for those who have such files already.

A file is one or more zstd frames of records of 9,250 bytes, little-endian, without a header:

    float32[9]     three triples of win, draw, loss: the game's result, the result without blunders, the search's Q
    float32        how much worse the played move was
    56 bytes       White to move, then nothing
    float32[3]     policy divergence, moves left, Q difference
    float16[2], int16    deviations of Q, the move in the parent
    int16[92], float16[92]    moves in LC0's order of 1858 and their probabilities; the last one again as padding
    uint8[64, 137] squares: 8 boards (newest first) of 13 one-hot pieces (none, ours PNBRQK, theirs), 8 repetitions, 4
                   castling rights (ours K Q, theirs K Q), 50-move count, plies since a move, en passant (on the pawn
                   that may be taken), 2 future blunders, rank and file one-hot; a one is the byte 100

Everything is seen from the side to move. Which square a slot stands for is read from its rank and file.

What a record (record.py) keeps: the newest board, en passant, the likeliest of the first triple as value, all legal
moves, and as best those with the highest probability. `dtz` is 0 and every outcome 255: not known. Earlier boards,
repetitions, the 50-move count, the other triples, probabilities and Q are dropped. Positions that are no endings of
this task, with castling rights or more pieces than it has, are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from manyhands.config.extras import optional
from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.distances import DRAW, LOSS, WIN, Int64s
from manyhands.tasks.chess_endgames.moves import is_legal, legal_moves
from manyhands.tasks.chess_endgames.pieces import MOST_MEN
from manyhands.tasks.chess_endgames.record import Record, by_pieces, columns, empty_record, men_of

RECORD_BYTES = 9250
MOST_MOVES = 92
"""Of a record of a file, and room for moves in what is read from one."""
BLOCK_RECORDS = 1024
POLICY_MOVES = 1858

TPG_RECORD = np.dtype(
    [
        ("results", "<f4", (3, 3)),
        ("suboptimality", "<f4"),
        ("white_to_move", "u1", (56,)),
        ("search", "<f4", (3,)),
        ("deviations", "<f2", (2,)),
        ("parent_move", "<i2"),
        ("policy_moves", "<i2", (MOST_MOVES,)),
        ("probabilities", "<f2", (MOST_MOVES,)),
        ("squares", "u1", (64, 137)),
    ]
)
assert TPG_RECORD.itemsize == RECORD_BYTES

_PIECES, _CASTLING, _EN_PASSANT = slice(0, 13), slice(112, 116), 118
_RANK, _FILE = slice(121, 129), slice(129, 137)
_PAWN = 1

_Checks = npt.NDArray[np.bool_] | np.bool_
_Require = Callable[[_Checks, str], None]
"""Raises DataError that names the first record ([N]) where it is not so, and says why."""

COLUMNS = columns(MOST_MOVES)
"""Of what read_tpg yields."""


def read_tpg(path: Path) -> Iterator[Record]:
    """The endings among a file's records, in blocks of up to BLOCK_RECORDS rows, with room for MOST_MOVES moves.

    Raises DataError, which names the record, for a file that is no whole number of records, or whose fields are not
    what the format says; and MissingExtra without pyarrow, which decompresses.
    """
    arrow = optional("pyarrow", extra="shards", option="reading TPG files")
    first = 0
    try:
        with arrow.input_stream(str(path), compression="zstd") as stream:
            while data := _read_block(stream):
                if len(data) % RECORD_BYTES:
                    raise DataError(
                        f"{path} holds {first * RECORD_BYTES + len(data):,} bytes, which is no whole number of "
                        f"records of {RECORD_BYTES:,}: it is another format, or was cut short."
                    )
                block = np.frombuffer(data, dtype=TPG_RECORD)
                numbers = np.arange(first, first + len(block))
                first += len(block)
                kept = _endings(block["squares"])
                if kept.any():
                    yield _converted(block[kept], f"{path}: record", numbers[kept])
    except OSError as error:
        raise DataError(
            f"cannot read {path} as zstd: {error}. It is another format, or was cut short."
        ) from None
    if not first:
        raise DataError(f"{path} is empty: expected records of {RECORD_BYTES:,} bytes.")


@lru_cache(maxsize=1)
def policy_moves() -> Int64s:
    """[1858]: LC0's moves by number, as from + 64 * to + 4096 * promotion.

    First the moves of a queen or a knight from every square, by square of departure and arrival (a1 b1 ... h8); a
    pawn's among them that reaches the last rank becomes a knight. Then the promotions to queen, rook and bishop, by
    squares.
    """
    numbers = []
    for start in range(64):
        for end in range(64):
            right, up = abs(end % 8 - start % 8), abs(end // 8 - start // 8)
            if start != end and (not right or not up or right == up or right * up == 2):
                numbers.append(start + 64 * end)
    for start in range(48, 56):
        for end in range(max(56, start + 7), min(64, start + 10)):
            numbers += [start + 64 * end + 4096 * promotion for promotion in (4, 3, 2)]
    assert len(numbers) == POLICY_MOVES
    return np.array(numbers)


def _read_block(stream: BinaryIO) -> bytes:
    parts, missing = [], BLOCK_RECORDS * RECORD_BYTES
    while missing and (data := stream.read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def _endings(slots: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """bool [N]: no castling rights, and no more men than an ending of the task has."""
    men = (slots[:, :, 1:13] > 0).any(axis=2).sum(axis=1)
    few: npt.NDArray[np.bool_] = (men <= MOST_MEN) & ~slots[:, :, _CASTLING].any(axis=(1, 2))
    return few


def _converted(block: npt.NDArray[Any], where: str, numbers: Int64s) -> Record:
    """`where` and `numbers` name the records in errors."""

    def require(good: _Checks, what: str) -> None:
        wrong = np.flatnonzero(~good)
        if wrong.size:
            raise DataError(f"{where} {numbers[wrong[0]]}: {what}. The file is another format, or broken.")

    record = empty_record(len(block), MOST_MOVES)
    _write_board(record, block["squares"], require)
    result = block["results"][:, 0].astype(np.float64)
    good = np.isfinite(result).all(axis=1) & (result >= 0).all(axis=1)
    require(good & (np.abs(result.sum(axis=1) - 1) < 0.01), "win, draw and loss are no probabilities")
    record["value"][:] = np.array([WIN, DRAW, LOSS])[result.argmax(axis=1)]
    listed, probabilities = block["policy_moves"], block["probabilities"].astype(np.float64)
    require(
        ((listed >= 0) & (listed < POLICY_MOVES)).all(axis=1), f"a move's number is not below {POLICY_MOVES}"
    )
    good = np.isfinite(probabilities) & (probabilities >= 0) & (probabilities <= 1.01)
    require(good.all(axis=1) & (probabilities.max(axis=1) > 0), "the moves' probabilities are none")
    _write_moves(record, _played(record, policy_moves()[listed]), probabilities, require)
    return record


def _write_board(record: Record, slots: npt.NDArray[np.uint8], require: _Require) -> None:
    one_hot = {"piece": slots[:, :, _PIECES], "rank": slots[:, :, _RANK], "file": slots[:, :, _FILE]}
    for name, ones in one_hot.items():
        require(((ones > 0).sum(axis=2) == 1).all(axis=1), f"a square has no {name}, or several")
    square = one_hot["rank"].argmax(axis=2) * 8 + one_hot["file"].argmax(axis=2)
    require((np.sort(square, axis=1) == np.arange(64)).all(axis=1), "its squares are not the board's 64")
    np.put_along_axis(record["squares"], square, one_hot["piece"].argmax(axis=2).astype(np.uint8), axis=1)
    for king in (6, 12):
        require((record["squares"] == king).sum(axis=1) == 1, "it has not one king of each colour")
    row, slot = np.nonzero(slots[:, :, _EN_PASSANT])
    pawn = square[row, slot]
    require(np.bincount(row, minlength=len(slots)) < 2, "two pawns may be taken en passant")
    passed = np.ones(len(slots), dtype=np.bool_)
    passed[row] = (pawn >> 3 == 4) & (record["squares"][row, pawn] == _PAWN + 6)
    require(passed, "the pawn to be taken en passant is none of the opponent's that moved two")
    record["en_passant"][row] = pawn + 8


def _played(record: Record, numbers: Int64s) -> Int64s:
    """LC0's plain move to the last rank is a pawn's promotion to a knight."""
    piece = np.take_along_axis(record["squares"], numbers & 63, axis=1)
    knight = (piece == _PAWN) & (numbers < 4096) & (numbers >> 6 >= 56)
    played: Int64s = numbers + 4096 * knight
    return played


def _write_moves(
    record: Record, listed: Int64s, probabilities: npt.NDArray[np.float64], require: _Require
) -> None:
    """All legal moves, those en passant only as far as they are listed; best: those of the highest probability."""
    rows = len(listed)
    keys = [np.zeros(0, dtype=np.int64)]
    for own, other, chosen in by_pieces(record["squares"]):
        men = men_of(own, other, record["squares"][chosen])
        legal = np.ones(rows, dtype=np.bool_)
        legal[chosen] = is_legal(men)
        require(legal, "the side that is not to move is in check, or a pawn is on the first or last rank")
        moves = legal_moves(men)
        keys.append(chosen[moves.row] << 15 | moves.number)
    asked = np.arange(rows)[:, None] << 15 | listed
    known = np.sort(np.concatenate(keys))
    origin, target = listed & 63, (listed >> 6) & 63
    pawns = np.take_along_axis(record["squares"], origin, axis=1) == _PAWN
    passing = pawns & (target == record["en_passant"][:, None]) & np.isin(target - origin, (7, 9))
    require((np.isin(asked, known) | passing).all(axis=1), "a move of its policy is not legal")
    known = np.union1d(known, asked[passing])
    row = known >> 15
    counts = np.bincount(row, minlength=rows)
    require(counts <= MOST_MOVES, f"it has more than {MOST_MOVES} legal moves")
    slot = np.arange(len(known)) - (np.cumsum(counts) - counts)[row]
    record["moves"][row, slot] = known & 0x7FFF
    likeliest = asked[probabilities == probabilities.max(axis=1, keepdims=True)]
    record["best"][row, slot] = np.isin(known, likeliest)
