"""Decoded files against python-chess, place by place of random positions, and files that are broken."""

from __future__ import annotations

import contextlib
import re
import shutil

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.moves import is_legal
from manyhands.tasks.chess_endgames.pieces import ending
from manyhands.tasks.chess_endgames.resolving import places
from manyhands.tasks.chess_endgames.syzygy import read_table

# every way of numbering: three unlike pieces, two kings, pairs, one or two leading pawns, pawns of both
# colours; files of one value only, of one side, with and without maps
NAMES = [
    "KBvK", "KPvK", "KQvK", "KBBvK", "KBNvK", "KBvKN", "KNNvK", "KPPvK", "KPvKP", "KQPvK", "KQvKQ", "KQvKR",
    "KRvKN", "KRvKP", "KNvKP",
]  # fmt: skip


def sides_of(name: str) -> list[tuple[str, str]]:
    return list(ending(*name.split("v")).sides)


@pytest.mark.parametrize("name", NAMES)
def test_stored_values_are_what_python_chess_reads(name, syzygy, probing, random_men, boards):
    table = read_table(syzygy / f"{name}.rtbw")
    checked = 0
    for own, other in sides_of(name):
        men = random_men(own, other, 400, 2)
        men = men.rows(is_legal(men))
        expected = [probing.probe_wdl_table(board) for board in boards(men)]
        for rows, part, place in places(table, men):
            assert (part.stored[place].astype(int) - 2).tolist() == [expected[row] for row in rows]
            checked += len(rows)
    assert checked > 100


@pytest.mark.parametrize("name", NAMES)
def test_stored_distances_are_what_python_chess_reads(name, syzygy, probing, random_men, boards):
    table = read_table(syzygy / f"{name}.rtbz")
    checked = 0
    for own, other in sides_of(name):
        men = random_men(own, other, 400, 3)
        men = men.rows(is_legal(men))
        every = boards(men)
        wdl = np.array([probing.probe_wdl(board) for board in every])
        counted = np.array([abs(probing.probe_dtz(board)) > 1 for board in every])  # else it is not looked up
        for rows, part, place in places(table, men):
            expected = [probing.probe_dtz_table(every[row], int(wdl[row])) for row in rows]
            stored = own == other or part.black_to_move == (ending(own, other).strong != own)
            assert {known >= 0 for _, known in expected} == {stored}
            if stored:
                some = counted[rows]
                found = part.distance(place[some], wdl[rows][some])
                assert found.tolist() == [
                    dtz for (dtz, _), asked in zip(expected, some, strict=True) if asked
                ]
                checked += len(found)
    assert checked >= 4 or name in {"KBvK", "KBvKN", "KNNvK"}  # which have no wins but mates


def test_a_broken_file_is_an_error_that_names_it(syzygy, tmp_path):
    whole = (syzygy / "KQvKR.rtbw").read_bytes()
    path = tmp_path / "KQvKR.rtbw"
    for broken in (b"", whole[:3], whole[:60], whole[: len(whole) // 2], b"\0" * 4 + whole[4:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=re.escape(f"{path} is broken or cut short")):
            read_table(path)
    shutil.copy(syzygy / "KQvKR.rtbw", tmp_path / "KQvKR.rtbz")
    with pytest.raises(DataError, match="its first bytes are another file's"):
        read_table(tmp_path / "KQvKR.rtbz")
    with pytest.raises(DataError, match="cannot read the Syzygy table"):
        read_table(tmp_path / "KRvKR.rtbw")


def test_reading_any_bytes_ends_with_a_table_or_with_our_error(syzygy, tmp_path):
    whole = bytearray((syzygy / "KPvK.rtbw").read_bytes())
    random = np.random.default_rng(0)
    path = tmp_path / "KPvK.rtbw"
    for _ in range(40):
        changed = bytearray(whole)
        changed[random.integers(4, 200)] ^= int(random.integers(1, 256))
        path.write_bytes(changed)
        with contextlib.suppress(DataError):
            read_table(path)
