"""What a checkpoint of a table task says of rows, and its model by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.tables import Faults, Rows, typed_columns
from manyhands.errors import DataError
from manyhands.tasks.protocol import Saved
from manyhands.tasks.tables.model import FEATURES, load_pretrained, read_description

EXAMPLE_ROWS = 4


def load_saved(directory: Path) -> Saved:
    """fp32 features [N, F], as statistics.json makes them of a row, -> outputs [N, outputs]. Raises DataError."""
    model = load_pretrained(directory)
    width = len(read_description(directory)[1].features())
    features_NF = torch.linspace(-1, 1, EXAMPLE_ROWS * width).view(EXAMPLE_ROWS, width)
    return Saved(
        model=model,
        call=model,
        inputs={FEATURES: features_NF},
        axes={FEATURES: {0: "batch"}},
        outputs=("outputs",),
    )


def saved_outputs(
    directory: Path, rows: Sequence[Mapping[str, str | float | None]], task: str
) -> tuple[dict[str, Any], npt.NDArray[np.float64]]:
    """table.json and the outputs [N, outputs] of the model saved in `directory` for `rows` (column -> value).

    None and "" are missing values, which are filled as in training. Raises DataError for another task's
    directory, a column that a row does not have, or a text where a number belongs.
    """
    table, statistics = read_description(directory)
    if table["task"] != task:
        raise DataError(
            f"{directory} holds a model of task {table['task']!r}, not {task!r}: use its own predict"
        )
    names = tuple(column.name for column in statistics.columns)
    cells = []
    for i, row in enumerate(rows):
        if absent := [name for name in names if name not in row]:
            raise DataError(f"row {i} has no column {absent[0]!r}; give None where its value is missing")
        cells.append(tuple(None if row[name] in (None, "") else str(row[name]) for name in names))
    table_rows = Rows(columns=names, cells=tuple(cells), places=tuple(f"row {i}" for i in range(len(cells))))
    categorical = [column.name for column in statistics.columns if column.categories is not None]
    numeric = [name for name in names if name not in categorical]
    numbers, texts, _ = typed_columns(table_rows, numeric, categorical, Faults(stop=True))
    model = load_pretrained(directory)
    with torch.inference_mode():
        outputs = model(torch.from_numpy(statistics.matrix(numbers, texts)))
    return table, outputs.double().numpy()
