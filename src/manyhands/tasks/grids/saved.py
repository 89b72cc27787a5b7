"""The pixel transformer of a checkpoint by itself."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from manyhands.tasks.grids.model import CLASSES
from manyhands.tasks.grids.task import CONFIGURATION, load_pretrained
from manyhands.tasks.protocol import Saved


def load_saved(directory: Path) -> Saved:
    """Grids [B, S, S] and shown pairs [B, C, S, S], int64, and a mask bool [B, C] -> logits [B, S, S, 11]. B and C
    are free. Raises DataError.
    """
    model = load_pretrained(directory)
    pairs = int(json.loads((directory / CONFIGURATION).read_text(encoding="utf-8"))["context"])
    batch, size = 2, model.size

    def grids(*shape: int) -> torch.Tensor:
        return torch.arange(torch.Size(shape).numel()).view(shape) % CLASSES

    several = {0: "batch", 1: "pairs"}
    return Saved(
        model=model,
        call=model,
        inputs={
            "inputs": grids(batch, size, size),
            "context_inputs": grids(batch, pairs, size, size),
            "context_outputs": grids(batch, pairs, size, size),
            "context_mask": torch.ones(batch, pairs, dtype=torch.bool),
        },
        axes={
            "inputs": {0: "batch"},
            "context_inputs": several,
            "context_outputs": several,
            "context_mask": several,
        },
        outputs=("logits",),
    )
