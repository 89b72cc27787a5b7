"""Three men solved without tables: known facts, consistency, and equality with the tables everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import from_fen
from manyhands.tasks.chess_endgames.children import MATED, UNREACHABLE, dense_index
from manyhands.tasks.chess_endgames.record import men_of
from manyhands.tasks.chess_endgames.retrograde import Solved


@pytest.fixture(scope="module")
def solved() -> Solved:
    return Solved()


@pytest.mark.parametrize(("own", "plies"), [("KQ", 19), ("KR", 31), ("KP", 55)])
def test_the_longest_mates_are_the_known_ones(solved, own, plies):
    """Ten moves with the queen, sixteen with the rook, twenty-eight with the pawn."""
    mates = solved.mates(own, "K")
    assert mates.max() == plies
    lost = solved.mates("K", own)
    assert lost[lost != MATED].min() == -plies - 1


@pytest.mark.parametrize("piece", ["B", "N"])
def test_a_minor_piece_draws(solved, piece):
    for side in (("K" + piece, "K"), ("K", "K" + piece)):
        assert set(np.unique(solved.values(*side))) == {UNREACHABLE, 0}
        assert not solved.distances(*side).any()


@pytest.mark.parametrize(
    ("fen", "value", "distance", "mate"),
    [
        ("8/8/8/8/8/k7/8/K6q b - - 0 1", None, None, None),  # Black to move, White in check
        ("7k/8/5K2/8/8/8/8/6Q1 w - - 0 1", 2, 1, 1),
        ("8/8/8/8/8/1k6/p7/K7 w - - 0 1", 0, 0, 0),  # stalemate
        ("4k3/4P3/4K3/8/8/8/8/8 b - - 0 1", 0, 0, 0),
        ("4k3/4P3/3K4/8/8/8/8/8 b - - 0 1", -2, -4, None),  # Kf7 Kd7, any, e8
        ("8/8/8/4k3/8/8/4P3/4K3 w - - 0 1", 0, 0, 0),
        ("8/8/8/8/4k3/8/4K3/8 w - - 0 1", 0, 0, 0),
    ],
)
def test_known_positions(solved, fen, value, distance, mate):
    squares, _ = from_fen([fen])
    codes = squares[0]
    own = "K" + "".join("PNBRQ"[code - 1] for code in codes if 1 <= code < 6)
    other = "K" + "".join("PNBRQ"[code - 7] for code in codes if 7 <= code < 12)
    place = dense_index(men_of(own, other, squares))
    if value is None:
        assert solved.values(own, other)[place] == UNREACHABLE
        return
    assert solved.values(own, other)[place] == value
    assert solved.distances(own, other)[place] == distance
    if mate is not None:
        assert solved.mates(own, other)[place] == mate


def test_four_men_are_refused(solved):
    with pytest.raises(DataError, match="KPvKP has 4 men"):
        solved.values("KP", "KP")


@pytest.mark.parametrize("piece", list("PNBRQ"))
def test_the_same_as_the_tables_everywhere(solved, resolved, piece):
    for own, other in (("K" + piece, "K"), ("K", "K" + piece)):
        values = resolved.values(own, other)
        assert (solved.values(own, other) == values).all()
        legal = values != UNREACHABLE
        assert legal.sum() > 140_000
        assert (solved.distances(own, other)[legal] == resolved.distances(own, other)[legal]).all()
