"""Boards from FEN and back, from the side to move."""

from __future__ import annotations

import chess
import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import LETTERS, from_fen, to_fen

WHITE = "8/8/4k3/3pP3/8/8/8/4K3 w - d6 0 1"


def test_the_mover_is_white_and_below():
    squares, en_passant = from_fen([WHITE, "4k3/8/8/8/3Pp3/4K3/8/8 b - d3 0 1"])
    assert squares.dtype == np.uint8
    assert en_passant.dtype == np.int8
    assert squares[0].tolist() == squares[1].tolist()
    assert en_passant.tolist() == [chess.D6, chess.D6]
    assert LETTERS[squares[0, chess.E1]] == "K"
    assert LETTERS[squares[0, chess.D5]] == "p"
    assert to_fen(squares, en_passant) == [WHITE, WHITE]


def test_black_to_move_is_the_mirrored_position():
    fen = "8/5k2/8/2Q5/8/1p6/8/K7 b - - 3 9"
    squares, en_passant = from_fen([fen])
    assert to_fen(squares, en_passant)[0].split()[:4] == chess.Board(fen).mirror().fen().split()[:4]


@pytest.mark.parametrize(
    ("fen", "says"),
    [
        ("", "expected pieces, then w or b"),
        ("8/8/8/8/8/8/8/8", "expected pieces, then w or b"),
        ("8/8/8/8/8/8/8 w", "7 ranks instead of 8"),
        ("8/8/8/8/8/8/8/7 w", "rank '7' has 7 squares"),
        ("8/8/8/8/8/8/8/KX6 w", "'X' is no piece"),
        ("8/8/8/8/8/8/8/K2..3 w", "'.' is no piece"),
        ("4k3/8/8/8/8/8/8/4K2R w K - 0 1", "castling rights 'K'"),
        ("8/8/4k3/3pP3/8/8/8/4K3 w - e6 0 1", "behind no pawn that moved two"),
        ("8/8/4k3/3pP3/8/8/8/4K3 w - x9 0 1", "'x9' is no en passant square"),
    ],
)
def test_what_is_no_position_is_refused(fen, says):
    with pytest.raises(DataError, match=says):
        from_fen([fen])


def test_no_positions_are_none():
    squares, en_passant = from_fen([])
    assert squares.shape == (0, 64)
    assert en_passant.shape == (0,)
