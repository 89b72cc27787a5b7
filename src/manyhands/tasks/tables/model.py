"""The model of the table tasks, and what describes it in materials and checkpoints: table.json, statistics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from manyhands.data.features import Statistics, read_statistics, statistics_from
from manyhands.errors import DataError
from manyhands.plan.tables import SurvivalTask, TabularTask
from manyhands.tasks.own_model import checkpoint_at, load_model

_MEANINGS = ("classes", "outputs", "mean", "deviation")
"""What table.json says of the outputs."""
STATISTICS, TABLE = "statistics.json", "table.json"
FEATURES = "features"


class TableModel(torch.nn.Module):
    """Linear layers with ReLU between them; without hidden layers a single one."""

    def __init__(self, features: int, hidden_sizes: Sequence[int], outputs: int, *, bias: bool) -> None:
        """`bias` of the last layer: the Cox likelihood does not depend on it."""
        super().__init__()
        widths = [features, *hidden_sizes]
        self.hidden = torch.nn.ModuleList(
            torch.nn.Linear(before, after) for before, after in pairwise(widths)
        )
        self.last = torch.nn.Linear(widths[-1], outputs, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, F] -> [B, outputs]."""
        for layer in self.hidden:
            features = torch.relu(layer(features))
        result: torch.Tensor = self.last(features)
        return result


def model_of(table: Mapping[str, Any], statistics: Statistics) -> TableModel:
    """A new model of the shape that table.json and statistics.json say."""
    features = len(statistics.features())
    return TableModel(features, table["hidden_sizes"], table["outputs"], bias=table["bias"])


def load_pretrained(directory: Path) -> TableModel:
    """The model that `save_pretrained` wrote, or a checkpoint holds, in evaluation mode. Raises DataError."""
    return load_model(directory, lambda place: model_of(*read_description(place)), "a table task")


def read_description(directory: Path) -> tuple[dict[str, Any], Statistics]:
    """table.json and statistics.json of materials or of a saved model. Raises DataError."""
    try:
        table = json.loads((directory / TABLE).read_text(encoding="utf-8"))
        statistics = statistics_from(json.loads((directory / STATISTICS).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{directory}: {TABLE} or {STATISTICS} is missing or broken ({error}); give a directory that a run of "
            "a table task wrote"
        ) from error
    return table, statistics


def described_by(weights: str) -> tuple[dict[str, Any], Statistics]:
    return read_description(checkpoint_at(weights))


def agreed_statistics(task: TabularTask | SurvivalTask, names: tuple[str, ...]) -> Statistics | None:
    """How the columns `names` become numbers, where it is not to be measured: as a file says, or as it was for the
    weights. Raises DataError.
    """
    if task.features.statistics is not None:
        return read_statistics(Path(task.features.statistics).expanduser(), task.features, names)
    if task.weights is None:
        return None
    return read_statistics(checkpoint_at(task.weights) / STATISTICS, task.features, names, "task.weights")


def as_answered(table: dict[str, Any], weights: str) -> dict[str, Any]:
    """`table`, with what the outputs meant for the weights. Raises DataError where these answers are others."""
    theirs = described_by(weights)[0]
    for key in ("task", "problem"):
        if theirs.get(key) != table.get(key):
            raise DataError(
                f"task.weights {weights!r} are of the {key} {theirs.get(key)!r}, the plan's is {table.get(key)!r}: "
                "give weights that were trained for it"
            )
    known = theirs.get("classes", [])
    if new := sorted(set(table.get("classes", [])) - set(known)):
        raise DataError(
            f"the target has the class {new[0]!r}, and task.weights {weights!r} know {', '.join(known)}: leave those "
            "rows out, or train without task.weights"
        )
    return {**table, **{key: theirs[key] for key in _MEANINGS if key in theirs}}


def check_alike(table: Mapping[str, Any], statistics: Statistics, weights: str) -> None:
    """Raises DataError where rows that were made ahead mean something else than those that the weights learned."""
    theirs, their_statistics = described_by(weights)
    if their_statistics != statistics:
        raise DataError(
            f"task.weights {weights!r}: there columns became numbers in another way than in these shards; make "
            "shards with the statistics.json of the weights as task.features.statistics"
        )
    for key in ("task", "problem", *_MEANINGS):
        if theirs.get(key) != table.get(key):
            raise DataError(
                f"task.weights {weights!r}: their {key} is {theirs.get(key)!r}, and that of these shards "
                f"{table.get(key)!r}: train on the table itself, which takes over what the weights' answers mean"
            )


def sizes_of(table: Mapping[str, Any], statistics: Statistics) -> dict[str, Any]:
    return {
        "task.hidden_sizes": table["hidden_sizes"],
        "features": list(statistics.features()),
        "outputs": table["outputs"],
    }


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
