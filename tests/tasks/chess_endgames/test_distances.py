"""What distances to zero say, cursed wins and blessed losses among them (no ending of four men has any)."""

from __future__ import annotations

import numpy as np

from manyhands.tasks.chess_endgames.distances import DRAW, LOSS, WIN, before_zeroing, outcome, rank, value


def test_from_best_to_worst():
    worse_and_worse = np.array([1, 2, 99, 100, 101, 150, 0, -150, -101, -100, -99, -2, -1])
    assert (np.diff(rank(worse_and_worse)) < 0).all()
    assert outcome(worse_and_worse).tolist() == [WIN] * 4 + [DRAW] * 5 + [LOSS] * 4


def test_a_zeroing_move_is_one_ply_from_what_it_leads_to():
    wdl = np.array([-2, -1, 0, 1, 2])
    assert before_zeroing(wdl).tolist() == [-1, -101, 0, 101, 1]
    assert value(wdl).tolist() == outcome(before_zeroing(wdl)).tolist() == [LOSS, DRAW, DRAW, DRAW, WIN]
