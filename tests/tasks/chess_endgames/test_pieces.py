"""Specifications: what they mean, which are refused, and which files they need."""

from __future__ import annotations

from pathlib import Path

import chess
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.pieces import (
    check_tables,
    ending,
    most_moves,
    needed_tables,
    parse,
    reachable,
)


def test_a_twin_is_the_same_ending_and_weights_add_up():
    one, two = parse("KRkp:3, KPkr ,KPkp"), parse("KPkp:1,kpKR:4")
    assert one == two
    assert [e.table for e in one.endings] == ["KPvKP", "KRvKP"]
    assert one.weights == (0.2, 0.8)
    assert parse(one.text) == one
    assert parse("KRkp").text == "KRkp"


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("kqrKP", "KQRvKP"),
        ("KNkb", "KBvKN"),
        ("KBNkp", "KBNvKP"),
        ("KRPkpr", "KRPvKRP"),
        ("KRNkrb", "KRBvKRN"),
    ],
)
def test_tables_are_named_as_syzygy_names_them(text, table):
    assert parse(text).endings[0].table == table


@given(st.lists(st.sampled_from("QRBNP"), max_size=5), st.integers(0, 5), st.randoms())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_names_agree_with_python_chess(pieces, split, random):
    first, second = ["K", *pieces[:split]], ["K", *pieces[split:]]
    random.shuffle(first)
    random.shuffle(second)
    one = ending("".join(first), "".join(second))
    assert chess.syzygy.normalize_tablename(f"{''.join(first)}v{''.join(second)}") == one.table
    assert ending(one.weak, one.strong) == one


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("KPp", "Black has 0 kings"),
        ("KKPkp", "White has 2 kings"),
        ("KXkp", "'X' is no piece"),
        ("Kk", "always a draw"),
        ("KQRBkqrb", "has 8 pieces"),
        ("KPkp:0", "'0' is not a number above 0"),
        ("KPkp:many", "'many' is not a number"),
        ("KPkp:inf", "'inf' is not a number"),
        ("KPkp,", "White has 0 kings"),
        ("", "White has 0 kings"),
    ],
)
def test_what_is_impossible_is_refused(text, says):
    with pytest.raises(DataError, match=says):
        parse(text)


def test_reachable_are_captures_promotions_and_both():
    assert {e.table for e in reachable(ending("KP", "K"))} == {"KPvK", "KQvK", "KRvK", "KBvK", "KNvK", "KvK"}
    assert "KQvKR" in {e.table for e in reachable(ending("KP", "KP"))}
    assert len(reachable(ending("KRP", "KRP"))) == len({e.table for e in reachable(ending("KRP", "KRP"))})


def test_distances_are_needed_of_the_ending_alone():
    assert [name for name in needed_tables(ending("KP", "KP")) if name.endswith(".rtbz")] == ["KPvKP.rtbz"]
    assert "KvK.rtbw" not in needed_tables(ending("KP", "KP"))


def test_missing_files_are_named(tmp_path: Path):
    for name in needed_tables(ending("KP", "K")):
        (tmp_path / name).touch()
    check_tables(parse("KPk").endings, tmp_path)
    (tmp_path / "KQvK.rtbw").unlink()
    (tmp_path / "KPvK.rtbz").unlink()
    with pytest.raises(DataError, match=r"6 Syzygy files, of which 2 are missing.*: KPvK.rtbz, KQvK.rtbw\."):
        check_tables(parse("KPk").endings, tmp_path)
    with pytest.raises(DataError, match="is not there"):
        check_tables(parse("KPk").endings, tmp_path / "other")


def test_no_position_has_more_moves_than_the_bound():
    assert most_moves("KP", "K") == 8 + 4
    assert most_moves("KQ", "K") == 8 + 27
    assert parse("KPkr").moves == max(most_moves("KP", "KR"), most_moves("KR", "KP"))
