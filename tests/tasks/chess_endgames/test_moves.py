"""Legal moves against python-chess, on positions with pins, checks, promotions and blocked pieces."""

from __future__ import annotations

import chess
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.tasks.chess_endgames.moves import Men, has_move, in_check, is_legal, legal_moves
from manyhands.tasks.chess_endgames.pieces import most_moves

SIDES = st.lists(st.sampled_from("QRBNP"), max_size=3).map(lambda letters: "K" + "".join(sorted(letters)))
MEANINGLESS = chess.STATUS_TOO_MANY_CHECKERS | chess.STATUS_IMPOSSIBLE_CHECK


def number(move: chess.Move) -> int:
    return move.from_square + 64 * move.to_square + 4096 * (move.promotion - 1 if move.promotion else 0)


def check_against_python_chess(men: Men, boards) -> int:
    """How many of the positions were legal."""
    legal = is_legal(men)
    for good, squares in zip(legal, np.hstack([men.own_squares, men.other_squares]).tolist(), strict=True):
        assert len(set(squares)) == len(squares) or not good
    every = boards(men)
    for good, board in zip(legal, every, strict=True):
        if len(board.piece_map()) == len(men.own) + len(men.other):
            assert good == (not board.status() & ~MEANINGLESS), board.fen()
    men, every = men.rows(legal), [board for board, good in zip(every, legal, strict=True) if good]
    moves = legal_moves(men)
    assert in_check(men).tolist() == [board.is_check() for board in every]
    assert has_move(men).tolist() == [any(board.legal_moves) for board in every]
    for row, board in enumerate(every):
        mine = moves.row == row
        assert moves.number[mine].tolist() == sorted(map(number, board.legal_moves)), board.fen()
        assert mine.sum() <= most_moves(men.own, men.other)
        for move, captured in zip(moves.target[mine], moves.captured[mine], strict=True):
            there = board.piece_at(int(move))
            assert (men.other[captured] if captured >= 0 else None) == (there and there.symbol().upper())
    return len(every)


@given(SIDES, SIDES, st.integers(0, 2**32))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_legal_moves_are_python_chess(boards, random_men, own, other, seed):
    check_against_python_chess(random_men(own, other, 60, seed), boards)


@pytest.mark.parametrize(("own", "other"), [("KP", "KRN"), ("KPP", "KQ"), ("KQ", "KBP"), ("KBN", "KR")])
def test_legal_moves_of_many_positions(boards, random_men, own, other):
    assert check_against_python_chess(random_men(own, other, 700, 5), boards) > 150


def test_pawns_about_to_promote_capture_and_step(boards):
    """Pawns on the seventh rank beside pieces on the eighth, and on the second with something in the way."""
    pawn, rook = np.divmod(np.arange(64 * 16), 64)
    pawns = np.where(pawn < 8, 8 + pawn, 40 + pawn)
    kings = np.broadcast_to([[chess.H4, chess.A5]], (len(pawns), 2))
    men = Men(
        own="KP",
        other="KR",
        own_squares=np.stack([kings[:, 0], pawns], axis=1),
        other_squares=np.stack([kings[:, 1], rook], axis=1),
    )
    assert check_against_python_chess(men, boards) > 600


def test_no_positions_have_no_moves():
    empty = np.zeros((0, 2), dtype=np.int64)
    assert len(legal_moves(Men(own="KP", other="KR", own_squares=empty, other_squares=empty)).row) == 0
