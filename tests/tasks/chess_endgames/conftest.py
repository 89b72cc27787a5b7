"""The tables that the tests look for, what python-chess says of a position, and arrays that are made once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import chess
import chess.syzygy
import numpy as np
import pytest

from manyhands.tasks.chess_endgames.moves import Men
from manyhands.tasks.chess_endgames.record import empty_record, place
from manyhands.tasks.chess_endgames.resolved import Resolved

SYZYGY = Path(os.environ.get("MANYHANDS_SYZYGY") or Path(__file__).parents[4] / "shared" / "data" / "syzygy")

Boards = Callable[[Men], list[chess.Board]]


@pytest.fixture(scope="session")
def syzygy() -> Path:
    if not (SYZYGY / "KPvKP.rtbw").is_file():
        pytest.skip("needs Syzygy's 3- and 4-man tables in MANYHANDS_SYZYGY or ../shared/data/syzygy")
    return SYZYGY


@pytest.fixture(scope="session")
def probing(syzygy: Path) -> Iterator[chess.syzygy.Tablebase]:
    with chess.syzygy.open_tablebase(str(syzygy)) as tables:
        yield tables


@pytest.fixture(scope="session")
def resolved(syzygy: Path, tmp_path_factory: pytest.TempPathFactory) -> Resolved:
    return Resolved(syzygy, tmp_path_factory.mktemp("resolved"))


@pytest.fixture(scope="session")
def boards() -> Boards:
    def make(men: Men) -> list[chess.Board]:
        record = empty_record(len(men), 1)
        place(record["squares"], np.arange(len(men)), men)
        return [board_of(row.tolist()) for row in record["squares"]]

    return make


def board_of(codes: list[int]) -> chess.Board:
    board = chess.Board(None)
    for square, code in enumerate(codes):
        if code:
            board.set_piece_at(square, chess.Piece((code - 1) % 6 + 1, code <= 6))
    return board


@pytest.fixture(scope="session")
def random_men() -> Callable[[str, str, int, int], Men]:
    """Men with these pieces on random squares, legal or not."""

    def make(own: str, other: str, count: int, seed: int) -> Men:
        squares = np.random.default_rng(seed).integers(64, size=(count, len(own) + len(other)))
        return Men(
            own=own, other=other, own_squares=squares[:, : len(own)], other_squares=squares[:, len(own) :]
        )

    return make
