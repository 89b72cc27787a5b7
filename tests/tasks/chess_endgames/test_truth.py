"""The record of positions against python-chess, from whole arrays, by probing, and without tables."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import chess
import chess.syzygy
import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import from_fen, to_fen
from manyhands.tasks.chess_endgames.pieces import needed_tables, parse
from manyhands.tasks.chess_endgames.record import Record
from manyhands.tasks.chess_endgames.resolved import MOST_MEN, Resolved
from manyhands.tasks.chess_endgames.retrograde import Solved
from manyhands.tasks.chess_endgames.truth import PositionSource, Truth, open_source, open_truth

# a double step that allows or forces en passant, stalemates and mates to be found, promotions to choose from
CORNERS = [
    "8/8/8/8/3p4/8/2P5/K1k5 w - - 0 1",
    "7k/5P2/8/6K1/8/8/8/8 w - - 0 1",
    "8/6P1/7k/8/7K/8/8/8 w - - 0 1",
    "k7/2P5/1K6/8/8/8/8/8 w - - 0 1",
    "3r4/2P5/8/1K6/8/8/8/k7 w - - 0 1",
    "1k6/8/1K6/8/8/3R3p/8/8 w - - 0 1",
    "8/8/8/8/4k3/8/8/4K2R b - - 0 1",
]
EN_PASSANT = ["8/8/4k3/3pP3/8/8/8/4K3 w - d6 0 1", "8/8/8/8/k2Pp3/8/8/K7 b - d3 0 1"]


@pytest.fixture(scope="module")
def arrays(syzygy: Path, resolved: Resolved) -> Truth:
    return Truth(resolved, MOST_MEN, syzygy)


@pytest.fixture(scope="module")
def one_by_one(syzygy: Path) -> Truth:
    return Truth(Solved(), 0, syzygy)


def expected(fen: str, tables: chess.syzygy.Tablebase) -> tuple[int, int, dict[int, int], set[int]]:
    """Value, distance, outcome of each move, the best moves: by python-chess and the words of record.py."""
    board = chess.Board(fen)
    wdl = tables.probe_wdl(board)
    outcomes, merits = {}, {}
    for move in board.legal_moves:
        number = move.from_square + 64 * move.to_square + 4096 * (move.promotion - 1 if move.promotion else 0)
        zeroing = board.is_zeroing(move)
        board.push(move)
        result = 0 if board.is_stalemate() or len(board.piece_map()) == 2 else -tables.probe_wdl(board)
        plies = 1 if zeroing or board.is_checkmate() else abs(tables.probe_dtz(board)) + 1
        board.pop()
        assert abs(result) != 1
        outcomes[number] = {-2: 0, 0: 1, 2: 2}[result]
        merits[number] = (result, -plies if result > 0 else plies if result < 0 else 0)
    best = max(merits.values())
    dtz = tables.probe_dtz(board)
    return {-2: 0, 0: 1, 2: 2}[wdl], dtz, outcomes, {number for number in merits if merits[number] == best}


def check(record: Record, tables: chess.syzygy.Tablebase) -> None:
    for row, fen in enumerate(to_fen(record["squares"], record["en_passant"])):
        value, dtz, outcomes, best = expected(fen, tables)
        known = record["moves"][row] >= 0
        moves = record["moves"][row][known].tolist()
        assert moves == sorted(outcomes), fen
        assert not known[len(moves) :].any()
        assert record["value"][row] == value, fen
        assert record["dtz"][row] == dtz, fen
        assert record["outcomes"][row][known].tolist() == [outcomes[move] for move in moves], fen
        assert set(np.array(moves)[record["best"][row][known] == 1]) == best, fen
        assert (record["outcomes"][row][~known] == 255).all()
        assert not record["best"][row][~known].any()


@pytest.mark.parametrize(
    ("pieces", "count"), [("KPkp", 250), ("KRkp", 60), ("KBNk", 40), ("KPk,KRk:2,KQk", 100)]
)
def test_random_positions_are_labelled_as_python_chess_finds_them(pieces, count, arrays, probing):
    source = PositionSource(specification=parse(pieces), truth=arrays)
    record = source.make(np.arange(count), seed=5)
    for name, dtype, shape in source.columns:
        assert record[name].dtype == dtype
        assert record[name].shape == (count, *shape)
    assert len(record) == len(source.columns)
    check(record, probing)


def test_given_positions_have_the_same_truth_both_ways(arrays, one_by_one, probing):
    squares, en_passant = from_fen([*CORNERS, *EN_PASSANT])
    record = arrays.label(squares, en_passant)
    check(record, probing)
    probed = one_by_one.label(squares, en_passant)
    assert all((probed[name] == record[name]).all() for name in record)


def test_a_row_is_the_same_in_any_batch(arrays):
    source = PositionSource(specification=parse("KPkp,KPk"), truth=arrays)
    whole = source.make(np.arange(300), seed=1)
    some = np.array([299, 5, 5, 120])
    parts = source.make(some, seed=1)
    assert all((parts[name] == whole[name][some]).all() for name in whole)
    labelled = arrays.label(whole["squares"], whole["en_passant"], moves=source.specification.moves)
    assert all((labelled[name] == whole[name]).all() for name in whole)
    assert all(len(column) == 0 for column in source.make(np.zeros(0, dtype=np.int64), seed=1).values())


def test_three_men_need_no_tables():
    source = open_source("KPk:2,KQk", None)
    record = source.make(np.arange(400), seed=2)
    assert (record["value"] == outcomes_best(record)).all()
    assert ((record["dtz"] > 0) == (record["value"] == 2)).all()
    assert ((record["dtz"] == 0) == (record["value"] == 1)).all()
    best = record["best"] == 1
    assert best.any(axis=1).all()
    assert (record["outcomes"][best] == record["value"][np.nonzero(best)[0]]).all()


def outcomes_best(record: Record) -> np.ndarray:
    return np.where(record["outcomes"] == 255, 0, record["outcomes"]).max(axis=1)


def test_torch_and_chess_are_not_loaded():
    """So that processes that make shards start soon, and three men need no extra."""
    code = (
        "import sys, numpy; from manyhands.tasks.chess_endgames.truth import open_source; "
        "open_source('KRk', None).make(numpy.arange(9), 0); print({'torch', 'chess'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "set()"


def test_three_men_are_the_same_with_and_without_tables(arrays):
    with_tables = PositionSource(specification=parse("KPk,KRk"), truth=arrays).make(np.arange(500), seed=9)
    without = open_source("KPk,KRk", None).make(np.arange(500), seed=9)
    assert all((without[name] == with_tables[name]).all() for name in without)


def test_what_has_no_truth_is_refused(tmp_path, syzygy):
    with pytest.raises(DataError, match=r"KPkp has more than 3 men.*KPvKP\.rtbz"):
        open_source("KPkp", None)
    with pytest.raises(
        DataError, match=r"KRPkrp needs .* Syzygy files, of which .* missing.*KRPvKRP\.rtbw, KRPvKRP\.rtbz"
    ):
        open_source("KPRkrp", syzygy)
    with pytest.raises(DataError, match="is not there"):
        open_source("KPk", tmp_path / "none")
    without = open_truth(None)
    for fen, says in [
        ("8/8/4k3/3pP3/8/8/8/4K3 w - d6 0 1", "without tables"),
        ("8/8/4k3/8/8/8/4P3/8 w - - 0 1", "expected one king of each colour"),
        ("7k/5K2/6Q1/8/8/8/8/8 b - - 0 1", "no legal move"),
        ("7k/5K2/8/8/8/8/8/7Q w - - 0 1", "not a legal position"),
        ("7k/8/8/8/8/8/8/K5P1 w - - 0 1", "not a legal position"),
    ]:
        with pytest.raises(DataError, match=says):
            without.label(*from_fen([fen]))


def test_the_files_that_are_asked_for_are_enough(syzygy, tmp_path, arrays):
    for name in needed_tables(parse("KPkp").endings[0]):
        shutil.copyfile(syzygy / name, tmp_path / name)
    source = PositionSource(specification=parse("KPkp"), truth=Truth(Solved(), 0, tmp_path))
    probed = source.make(np.arange(150), seed=8)
    looked_up = PositionSource(specification=parse("KPkp"), truth=arrays).make(np.arange(150), seed=8)
    assert all((probed[name] == looked_up[name]).all() for name in probed)


def test_many_men_are_said_to_be_slow(tmp_path, caplog):
    for name in needed_tables(parse("KPPkp").endings[0]):
        (tmp_path / name).touch()
    open_source("KPPkp", tmp_path)
    assert "KPPvKP has 5 men: its positions are probed one by one" in caplog.text


def test_probing_refuses_alike(one_by_one):
    for fen, says in [
        ("7k/5K2/6Q1/8/8/8/8/8 b - - 0 1", "no legal move"),
        ("7k/5K2/8/8/8/8/8/7Q w - - 0 1", "not a legal position"),
        ("4k3/8/8/8/8/8/8/QQQQK3 w - - 0 1", "Any mirror of the Syzygy tables"),
    ]:
        with pytest.raises(DataError, match=says):
            one_by_one.label(*from_fen([fen]))
