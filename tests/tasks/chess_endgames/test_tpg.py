"""TPG files written here from the format's description, read back; and what is not such a file."""

from __future__ import annotations

from pathlib import Path

import chess
import numpy as np
import pyarrow as pa
import pytest

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import from_fen
from manyhands.tasks.chess_endgames.tpg import (
    BLOCK_RECORDS,
    COLUMNS,
    MOST_MOVES,
    RECORD_BYTES,
    TPG_RECORD,
    policy_moves,
    read_tpg,
)

PAWN_ENDING = "8/8/4k3/8/3P4/3K4/8/8 w - - 0 1"
PROMOTION = "3r1k2/2P5/8/8/8/8/8/K7 w - - 0 1"
PASSING = "8/8/4k3/3pP3/8/8/8/4K3 w - d6 0 1"
BLACK = "8/8/8/4k3/8/1K6/2p5/8 b - - 0 1"


def index_of(uci: str) -> int:
    """In LC0's order, where a plain move of a pawn to the last rank is a knight."""
    move = chess.Move.from_uci(uci.removesuffix("n"))
    promotion = move.promotion - 1 if move.promotion else 0
    return policy_moves().tolist().index(move.from_square + 64 * move.to_square + 4096 * promotion)


def record_of(fen: str, policy: dict[str, float], wdl: tuple[float, float, float], *, turned: bool = False):
    """`turned`: the slots in the opposite order, as CeresTrain writes them for Black."""
    record = np.zeros((), dtype=TPG_RECORD)
    squares, en_passant = from_fen([fen])
    record["results"] = [wdl, (0, 1, 0), (0.3, 0.3, 0.4)]
    record["white_to_move"][0] = 1
    moves = [index_of(uci) for uci in policy]
    record["policy_moves"] = moves + moves[-1:] * (MOST_MOVES - len(moves))
    shares = list(policy.values())
    record["probabilities"] = shares + shares[-1:] * (MOST_MOVES - len(shares))
    slots = record["squares"]
    for square in range(64):
        slot = slots[63 - square if turned else square]
        for board in range(8):
            slot[13 * board + int(squares[0, square])] = 100
        slot[121 + square // 8] = 100
        slot[129 + square % 8] = 100
        slot[116] = 7
        if square == en_passant[0] - 8:
            slot[118] = 100
    return record


def write(path: Path, *records: np.ndarray, tail: bytes = b"") -> Path:
    data = b"".join(record.tobytes() for record in records) + tail
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)
    return path


@pytest.fixture
def good() -> list[np.ndarray]:
    return [
        record_of(PAWN_ENDING, {"d3c4": 0.25, "d3e4": 0.75, "d4d5": 0.0}, (0.9, 0.1, 0)),
        record_of(PROMOTION, {"c7d8q": 0.5, "c7d8n": 0.5, "c7c8r": 0.0}, (0, 0.2, 0.8), turned=True),
        record_of(PASSING, {"e5d6": 1.0}, (0, 1, 0)),
        record_of(BLACK, {"c7c8q": 1.0}, (1, 0, 0), turned=True),
    ]


def test_lc0_order_has_its_landmarks():
    moves = policy_moves().tolist()
    assert len(moves) == len(set(moves)) == 1858
    names = {
        0: "a1b1",
        6: "a1h1",
        7: "a1a2",
        9: "a1c2",
        1791: "h8g8",
        1792: "a7a8q",
        1794: "a7a8b",
        1857: "h7h8b",
    }
    for number, uci in names.items():
        assert index_of(uci) == number


def test_records_are_read_back(tmp_path, good):
    (block,) = read_tpg(write(tmp_path / "a.zst", *good))
    for name, dtype, shape in COLUMNS:
        assert block[name].dtype == dtype
        assert block[name].shape == (4, *shape)
    squares, en_passant = from_fen([PAWN_ENDING, PROMOTION, PASSING, BLACK])
    assert (block["squares"] == squares).all()
    assert (block["en_passant"] == en_passant).all()
    assert block["value"].tolist() == [2, 0, 1, 2]
    assert not block["dtz"].any()
    assert (block["outcomes"] == 255).all()
    for row, fen in enumerate([PAWN_ENDING, PROMOTION, PASSING, chess.Board(BLACK).mirror().fen()]):
        legal = chess.Board(fen).legal_moves
        known = block["moves"][row] >= 0
        expected = sorted(
            m.from_square + 64 * m.to_square + 4096 * (m.promotion - 1 if m.promotion else 0) for m in legal
        )
        assert block["moves"][row][known].tolist() == expected
        assert not block["best"][row][~known].any()
    best = [
        [names(move) for move in row[chosen == 1]]
        for row, chosen in zip(block["moves"], block["best"], strict=True)
    ]
    assert best == [["d3e4"], ["c7d8n", "c7d8q"], ["e5d6"], ["c7c8q"]]


def names(move: int) -> str:
    promotion = int(move) >> 12
    return chess.Move(int(move) & 63, int(move) >> 6 & 63, promotion + 1 if promotion else None).uci()


def test_a_long_file_comes_in_blocks_and_frames_follow_each_other(tmp_path, good):
    path = write(tmp_path / "a.zst", *(good[:1] * (BLOCK_RECORDS + 3)))
    assert [len(block["value"]) for block in read_tpg(path)] == [BLOCK_RECORDS, 3]
    frame = write(tmp_path / "b.zst", *good).read_bytes()
    (tmp_path / "c.zst").write_bytes(frame + frame)
    (block,) = read_tpg(tmp_path / "c.zst")
    assert (block["squares"][:4] == block["squares"][4:]).all()


def spoiled(record: np.ndarray, field: str, place: tuple[int, ...] | int, value: float) -> np.ndarray:
    other = record.copy()
    other[field][place] = value
    return other


@pytest.mark.parametrize(
    ("field", "place", "value", "says"),
    [
        ("results", (0, 0), np.nan, "win, draw and loss are no probabilities"),
        ("results", (0, 0), 0.5, "win, draw and loss are no probabilities"),
        ("policy_moves", 3, 1858, "a move's number is not below 1858"),
        ("policy_moves", 3, -1, "a move's number is not below 1858"),
        ("policy_moves", 3, 0, "a move of its policy is not legal"),
        ("probabilities", 0, np.inf, "the moves' probabilities are none"),
        ("squares", (5, 3), 100, "a square has no piece, or several"),
        ("squares", (5, 0), 0, "a square has no piece, or several"),
        ("squares", (5, 121), 0, "a square has no rank, or several"),
        ("squares", (20, 118), 100, "none of the opponent's that moved two"),
    ],
)
def test_a_broken_record_is_named(tmp_path, good, field, place, value, says):
    path = write(tmp_path / "a.zst", good[0], spoiled(good[0], field, place, value))
    with pytest.raises(DataError, match=f"record 1: .*{says}"):
        list(read_tpg(path))


def test_what_is_no_ending_is_left_out(tmp_path, good):
    castling = spoiled(good[0], "squares", (5, 112), 100)
    crowded = good[0].copy()
    empty = np.flatnonzero(crowded["squares"][:, 0])[:8]
    crowded["squares"][empty, 0], crowded["squares"][empty, 2] = 0, 100
    path = write(tmp_path / "a.zst", castling, good[0], crowded, good[1])
    (block,) = read_tpg(path)
    (expected,) = read_tpg(write(tmp_path / "b.zst", *good[:2]))
    assert all((block[name] == expected[name]).all() for name in block)
    assert list(read_tpg(write(tmp_path / "c.zst", castling, crowded))) == []
    with pytest.raises(DataError, match=r"record 2: .*a square has no piece"):
        list(read_tpg(write(tmp_path / "d.zst", castling, good[0], spoiled(good[0], "squares", (5, 0), 0))))


def test_squares_are_each_there_once_and_so_are_kings(tmp_path, good):
    twice = good[0].copy()
    twice["squares"][5] = twice["squares"][6]
    with pytest.raises(DataError, match="its squares are not the board's 64"):
        list(read_tpg(write(tmp_path / "a.zst", twice)))
    alone = spoiled(spoiled(good[0], "squares", (44, 12), 0), "squares", (44, 0), 100)
    with pytest.raises(DataError, match="not one king of each colour"):
        list(read_tpg(write(tmp_path / "b.zst", alone)))


def test_other_files_are_refused(tmp_path, good):
    for data, says in [
        (b"\x01" * 100, "100 bytes, which is no whole number of records of 9,250"),
        (b"", "is empty"),
    ]:
        with pytest.raises(DataError, match=says):
            list(read_tpg(write(tmp_path / "a.zst", tail=data)))
    cut = write(tmp_path / "b.zst", *good).read_bytes()[:-10]
    (tmp_path / "b.zst").write_bytes(cut)
    with pytest.raises(DataError, match=r"cannot read .*b.zst as zstd"):
        list(read_tpg(tmp_path / "b.zst"))
    (tmp_path / "c.zst").write_bytes(bytes(RECORD_BYTES))
    with pytest.raises(DataError, match=r"cannot read .*c.zst as zstd"):
        list(read_tpg(tmp_path / "c.zst"))
    with pytest.raises(DataError, match=r"cannot read .*none.zst"):
        list(read_tpg(tmp_path / "none.zst"))
