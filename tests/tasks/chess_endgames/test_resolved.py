"""Whole arrays of endings: the same as probing, made once, kept under the hash of their files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.children import MATED, UNREACHABLE, dense_index
from manyhands.tasks.chess_endgames.moves import is_legal
from manyhands.tasks.chess_endgames.pieces import ending, needed_tables
from manyhands.tasks.chess_endgames.resolved import Resolved


@pytest.mark.parametrize("name", ["KPvK", "KBNvK", "KPvKP"])
def test_every_position_is_what_probing_finds(name, resolved, probing, random_men, boards):
    for own, other in ending(*name.split("v")).sides:
        men = random_men(own, other, 900, 1)
        legal = is_legal(men)
        values, distances = resolved.values(own, other), resolved.distances(own, other)
        assert (values[dense_index(men.rows(~legal))] == UNREACHABLE).all()
        men = men.rows(legal)
        for place, board in zip(dense_index(men), boards(men), strict=True):
            assert values[place] == probing.probe_wdl(board), board.fen()
            expected = MATED if board.is_checkmate() else probing.probe_dtz(board)
            assert distances[place] == expected, board.fen()


@pytest.fixture
def few_tables(syzygy, tmp_path: Path) -> Path:
    directory = tmp_path / "tables"
    directory.mkdir()
    for name in needed_tables(ending("KP", "K")):
        shutil.copyfile(syzygy / name, directory / name)
    return directory


def test_arrays_are_made_once_and_again_for_other_files(few_tables, tmp_path):
    cache = tmp_path / "cache"
    Resolved(few_tables, cache).distances("KP", "K")
    made = {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")}
    assert made
    assert not list(cache.glob("*.part"))
    found = Resolved(few_tables, cache).distances("KP", "K")
    assert {path: path.stat().st_mtime_ns for path in cache.glob("*.npy")} == made
    assert not found.flags.writeable
    with (few_tables / "KQvK.rtbw").open("ab") as file:
        file.write(bytes(64))  # another file, with the same values
    Resolved(few_tables, cache).distances("KP", "K")
    again = set(cache.glob("*.npy")) - set(made)
    assert {path.name.rsplit("-", 1)[0] for path in again} >= {
        "KP-K-distances",
        "K-KP-distances",
        "K-KQ-values",
    }
    assert not any(path.name.startswith("K-KR") for path in again)


MAKE = """
import sys
from pathlib import Path
from manyhands.tasks.chess_endgames.resolved import Resolved
Resolved(Path(sys.argv[1]), Path(sys.argv[2])).distances("K", "KP")
"""


def test_two_processes_make_them_together(few_tables, tmp_path):
    both, once = tmp_path / "both", tmp_path / "once"
    makers = [
        subprocess.Popen([sys.executable, "-c", MAKE, str(few_tables), str(cache)])
        for cache in (both, both, once)
    ]
    assert [maker.wait(120) for maker in makers] == [0, 0, 0]
    assert {path.name for path in both.iterdir()} == {path.name for path in once.iterdir()}
    for path in once.glob("*.npy"):
        assert (np.load(path) == np.load(both / path.name)).all()


def test_what_cannot_be_read_or_kept_is_named(few_tables, tmp_path):
    (few_tables / "KRvK.rtbw").unlink()
    with pytest.raises(DataError, match=r"KRvK\.rtbw"):
        Resolved(few_tables, tmp_path / "cache").values("KP", "K")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot keep the decoded tables in .*MANYHANDS_HOME"):
        Resolved(few_tables, tmp_path / "file" / "cache").values("KQ", "K")
    if os.geteuid():
        (tmp_path / "shut").mkdir(mode=0o500)
        with pytest.raises(DataError, match="cannot keep"):
            Resolved(few_tables, tmp_path / "shut").values("KQ", "K")


def test_a_file_of_another_ending_is_named(few_tables, syzygy, tmp_path):
    shutil.copyfile(syzygy / "KRvK.rtbz", few_tables / "KQvK.rtbz")
    with pytest.raises(DataError, match=r"KQvK\.rtbz is broken.*it lists other pieces than its name"):
        Resolved(few_tables, tmp_path / "cache").distances("KQ", "K")


def test_files_that_contradict_each_other_are_named(few_tables, tmp_path):
    """Values of a file made here, which says that White always draws and Black always wins."""
    path = few_tables / "KPvK.rtbw"
    pieces = bytes([0x00, 0x11, 0x66, 0xEE])  # order, then P K k, alike for both sides
    one_value_each = bytes([0x80, 2, 0x80, 4])
    path.write_bytes(path.read_bytes()[:5] + 4 * pieces + b"\0" + 4 * one_value_each)
    resolved = Resolved(few_tables, tmp_path / "cache")
    assert set(np.unique(resolved.values("K", "KP"))) == {UNREACHABLE, 2}
    with pytest.raises(DataError, match=r"KPvK\.rtbz contradicts the \.rtbw files beside it"):
        resolved.distances("KP", "K")
    assert not list((tmp_path / "cache").glob("*distances*.npy"))


def test_a_torn_array_is_named(few_tables, tmp_path):
    cache = tmp_path / "cache"
    Resolved(few_tables, cache).values("KQ", "K")
    (path,) = cache.glob("KQ-K-values-*.npy")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"KQ-K-values.*remove it, and it is made again"):
        Resolved(few_tables, cache).values("KQ", "K")
