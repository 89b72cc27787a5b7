"""A trained model by itself: which kind of task wrote a checkpoint, and its model.

The directory tells it (config.json, adapter_config.json or table.json); a task of one's own does it with a method
of its family, `load_saved` (tasks/protocol.py: LoadsSaved).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, cast

from manyhands.errors import DataError
from manyhands.tasks.adapter import base_of
from manyhands.tasks.protocol import LoadsSaved, Saved, TaskFamily

_LOADERS: Final[Mapping[str, str]] = {
    "language_model": "manyhands.tasks.language_model.saved",
    "grids": "manyhands.tasks.grids.saved",
    "chess_endgames": "manyhands.tasks.chess_endgames.saved",
    "tabular": "manyhands.tasks.tables.saved",
    "survival": "manyhands.tasks.tables.saved",
}
"""name of the task -> module with load_saved(directory)."""


def load_saved(directory: Path, family: TaskFamily | None = None) -> Saved:
    """The model of a checkpoint. `family`: that of the task, where it is not one of manyhands.

    Raises DataError for a directory that is no checkpoint, is broken, or is of a task of one's own that has no
    `load_saved`.
    """
    if isinstance(family, LoadsSaved):
        return family.load_saved(directory)
    name = task_that_saved(directory)
    if name is None:
        raise DataError(
            f"{directory} does not say which task wrote it (config.json or table.json); for a task of your own give "
            "the directory of its training and --allow-task MODULE:NAME, and its family the method load_saved "
            "(tasks/protocol.py)"
        )
    return cast(LoadsSaved, importlib.import_module(_LOADERS[name])).load_saved(directory)


def task_that_saved(directory: Path) -> str | None:
    """Name of the task that a directory is a checkpoint of; None where it does not say. Raises DataError."""
    found = _json(directory / "table.json").get("task")
    if found is None:
        configuration = _json(directory / "config.json")
        found = configuration.get("task")
        if found not in _LOADERS and ("model_type" in configuration or base_of(directory) is not None):
            found = "language_model"
    return found if found in _LOADERS else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}; give a whole checkpoint") from error
    return values if isinstance(values, dict) else {}
