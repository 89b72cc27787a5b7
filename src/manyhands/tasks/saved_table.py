"""The models of the table tasks by themselves: what `TableTask.save_pretrained` wrote."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from manyhands.errors import DataError
from manyhands.tasks.protocol import Saved
from manyhands.tasks.table_family import FEATURES, WEIGHTS, model_of, read_description

EXAMPLE_ROWS = 4


def load_saved(directory: Path) -> Saved:
    """fp32 features [N, F], as statistics.json makes them of a row, -> outputs [N, outputs]. Raises DataError."""
    table, statistics = read_description(directory)
    width = len(statistics.features())
    model = model_of(table, width).eval()
    try:
        model.load_state_dict(load_file(directory / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{directory / WEIGHTS}: {error}; give a directory that a run of a table task wrote"
        ) from error
    features_NF = torch.linspace(-1, 1, EXAMPLE_ROWS * width).view(EXAMPLE_ROWS, width)
    return Saved(
        model=model,
        call=model,
        inputs={FEATURES: features_NF},
        axes={FEATURES: {0: "batch"}},
        outputs=("outputs",),
    )
