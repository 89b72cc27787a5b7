"""The endgame transformer of a checkpoint by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from manyhands.tasks.chess_endgames.boards import from_fen
from manyhands.tasks.chess_endgames.network import Outputs
from manyhands.tasks.chess_endgames.task import load_pretrained
from manyhands.tasks.protocol import Saved

_EXAMPLES = ("8/1P6/8/8/8/2k5/8/6K1 w - - 0 1", "8/P7/8/8/2k5/8/8/1K6 w - - 0 1")
_MOVES = (
    (6 + 64 * 5, 6 + 64 * 7, 6 + 64 * 15, 49 + 64 * 57 + 4096 * 1, 49 + 64 * 57 + 4096 * 4),
    (1 + 64 * 0, 1 + 64 * 9, 1 + 64 * 2, 48 + 64 * 56 + 4096 * 2, 48 + 64 * 56 + 4096 * 3),
)


def load_saved(directory: Path) -> Saved:
    """squares uint8 [B, 64], en_passant int8 [B] and legal moves int16 [B, M] (-1: none) -> value [B, 3], policy
    [B, M] and moves_left [B]; B and M are free. Of a model with a token for each piece the boards have no more pieces
    than it was trained on. Raises DataError.
    """
    model = load_pretrained(directory)
    squares, en_passant = from_fen(_EXAMPLES)
    return Saved(
        model=model,
        call=model,
        inputs={
            "squares": torch.from_numpy(squares),
            "en_passant": torch.from_numpy(en_passant),
            "moves": torch.tensor(_MOVES, dtype=torch.int16),
        },
        axes={"squares": {0: "batch"}, "en_passant": {0: "batch"}, "moves": {0: "batch", 1: "moves"}},
        outputs=Outputs._fields,
    )
