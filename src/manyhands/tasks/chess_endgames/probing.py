"""Truth of one position at a time from Syzygy tables, through the `chess` package (extra `chess`).

Slow (about a thousand positions a second) and for every case: endings of more men than are decoded whole
(resolved.py), and en passant.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manyhands.config.extras import optional
from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.boards import OTHER_SIDE
from manyhands.tasks.chess_endgames.distances import Labels, before_zeroing

if TYPE_CHECKING:
    import chess
    import chess.syzygy


class Prober:
    """Tables of a directory, opened as they are needed. Probes one at a time, also of several threads."""

    def __init__(self, directory: Path) -> None:
        self._chess = optional("chess", extra="chess", option="the truth of chess endings")
        self._syzygy = optional("chess.syzygy", extra="chess", option="the truth of chess endings")
        self._tables: chess.syzygy.Tablebase = self._syzygy.open_tablebase(str(directory))
        self._turn = threading.Lock()
        self._directory = directory

    def probe(self, row: list[int], en_passant: int) -> Labels:
        """Truth of one position, 64 codes (boards.py). Raises DataError for a position without legal moves, one where
        the side not to move is in check, and for missing tables."""
        board = self._board(row, en_passant)
        try:
            with self._turn:
                wdl = self._tables.probe_wdl(board)
                dtz = self._tables.probe_dtz(board) if abs(wdl) == 2 else 0
                found = sorted((_number(move), self._after(board, move)) for move in board.legal_moves)
        except self._syzygy.MissingTableError as error:
            raise DataError(
                f"{board.fen()}: no table in {self._directory} answers ({error}). Any mirror of the Syzygy "
                "tables has it: put its .rtbw and .rtbz files into that directory."
            ) from None
        return Labels(
            wdl=np.array([wdl]),
            dtz=np.array([dtz]),
            row=np.zeros(len(found), dtype=np.int64),
            number=np.array([number for number, _ in found]),
            distance=np.array([distance for _, distance in found]),
        )

    def _board(self, row: list[int], en_passant: int) -> chess.Board:
        board: chess.Board = self._chess.Board(None)
        for square, code in enumerate(row):
            if code:
                kind, own = (code - 1) % OTHER_SIDE + 1, code <= OTHER_SIDE
                board.set_piece_at(square, self._chess.Piece(kind, own))
        board.ep_square = en_passant if en_passant >= 0 else None
        wrong = board.status() & ~(self._chess.STATUS_TOO_MANY_CHECKERS | self._chess.STATUS_IMPOSSIBLE_CHECK)
        if wrong:
            raise DataError(f"{board.fen()} is not a legal position: {wrong!r}.")
        if not any(board.legal_moves):
            raise DataError(f"{board.fen()} has no legal move: the game is over there.")
        return board

    def _after(self, board: chess.Board, move: chess.Move) -> int:
        """Distance to zero for the mover of `board` when it plays `move`; beyond 100 for a cursed win or blessed
        loss. Syzygy's: a capture or pawn move is one ply from zero, whatever comes after."""
        zeroing = board.is_zeroing(move)
        board.push(move)
        try:
            if board.is_checkmate():
                return 1
            if board.is_stalemate() or len(board.piece_map()) == 2:
                return 0
            wdl = -self._tables.probe_wdl(board)
            if zeroing:
                return int(before_zeroing(np.array(wdl)))
            dtz = -self._tables.probe_dtz(board)
            return dtz + (dtz > 0) - (dtz < 0)
        finally:
            board.pop()


def _number(move: chess.Move) -> int:
    promotion = move.promotion - 1 if move.promotion else 0
    return move.from_square + 64 * move.to_square + 4096 * promotion
