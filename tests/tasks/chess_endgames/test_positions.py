"""Random positions: by number, legal, and uniform."""

from __future__ import annotations

import numpy as np

from manyhands.tasks.chess_endgames.boards import to_fen
from manyhands.tasks.chess_endgames.moves import Men, has_move, is_legal
from manyhands.tasks.chess_endgames.pieces import parse
from manyhands.tasks.chess_endgames.positions import draw
from manyhands.tasks.chess_endgames.record import place


def boards_of(text: str, indices: np.ndarray, seed: int) -> np.ndarray:
    squares = np.zeros((len(indices), 64), dtype=np.uint8)
    for rows, men in draw(parse(text), indices, seed):
        place(squares, rows, men)
    return squares


def test_a_row_depends_on_seed_and_number_alone():
    whole = boards_of("KPkp:2,KRk", np.arange(500), 3)
    some = np.array([499, 3, 3, 77])
    assert (boards_of("KPkp:2,KRk", some, 3) == whole[some]).all()
    assert (boards_of("KPkp:2,KRk", np.arange(500), 4) != whole).any(axis=1).mean() > 0.99
    far = boards_of("KPkp", np.array([2**62, 2**62 + 1]), -5)
    assert (far[0] != far[1]).any()


def test_positions_are_what_they_have_always_been():
    """Shards made in parts by two versions would not fit together."""
    fens = to_fen(boards_of("KPkp", np.arange(3), 1), np.full(3, -1, dtype=np.int8))
    assert [fen.split()[0] for fen in fens] == [
        "8/4K3/8/8/k5p1/4P3/8/8",
        "k7/8/8/2P5/8/8/5Kp1/8",
        "8/2k5/1p6/8/8/P7/1K6/8",
    ]


def test_all_are_legal_and_none_is_over():
    for rows, men in draw(parse("KQk,KPPk"), np.arange(2000), 0):
        assert len(rows) == len(men)
        assert is_legal(men).all()
        assert has_move(men).all()


def test_endings_come_by_weight_and_both_sides_move():
    drawn = {(men.own, men.other): len(rows) for rows, men in draw(parse("KRk:3,KQk"), np.arange(8000), 0)}
    rooks = drawn["KR", "K"] + drawn["K", "KR"]
    assert abs(rooks / 8000 - 0.75) < 4 * (0.75 * 0.25 / 8000) ** 0.5
    assert abs(drawn["K", "KR"] / rooks - 0.55) < 0.05  # with the rook's side to move, more are illegal


def test_every_position_is_as_likely():
    """Of king and queen against king: squares of the mover's king, by side, against a count of all positions."""
    grid = np.indices((64, 64, 64)).reshape(3, -1).T
    expected = []
    for own, other in (("KQ", "K"), ("K", "KQ")):
        men = Men(own=own, other=other, own_squares=grid[:, : len(own)], other_squares=grid[:, len(own) :])
        men = men.rows(is_legal(men))
        men = men.rows(has_move(men))
        expected.append(np.bincount(men.own_squares[:, 0], minlength=64))
    count = 40000
    drawn = {
        men.own: np.bincount(men.own_squares[:, 0], minlength=64)
        for _, men in draw(parse("KQk"), np.arange(count), 7)
    }
    share = np.concatenate(expected) / np.sum(expected) * count
    found = np.concatenate([drawn["KQ"], drawn["K"]])
    statistic = ((found - share) ** 2 / share).sum()
    assert abs(statistic - 127) < 4 * (2 * 127) ** 0.5  # chi-squared of 127 degrees of freedom
