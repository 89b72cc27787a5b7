"""The tabular task: classification or regression on the rows of a table.

Classification: cross-entropy in nats over the classes of the training rows, sorted; two classes have one
output, the logit of the second. Figures: accuracy, auc, brier. Regression: squared error of the target,
standardized by the training rows' mean and deviation. Figures in the target's own unit: r2, rmse.

Shapes: N rows, B of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from manyhands.data.comparisons import parse_comparison
from manyhands.data.features import Statistics
from manyhands.data.generated_tables import DEFAULT_ROWS, generated_answers
from manyhands.data.tables import Rows, canonical, number_of
from manyhands.errors import DataError
from manyhands.plan.tables import TabularTask
from manyhands.tasks.protocol import Batch, Task
from manyhands.tasks.scores import accuracy, brier, mean_auc, r2, rmse
from manyhands.tasks.tables.family import TableFamily
from manyhands.tasks.tables.opened import Arrays, TableTask
from manyhands.tasks.tables.saved import saved_outputs

LARGEST_CLASSES = 1000
"""More classes than this are a mistake: a number to be learned by regression, or a name of each row."""


class TabularFamily(TableFamily[TabularTask]):
    """How tabular tasks are prepared and opened."""

    settings_class = TabularTask

    def generated(self, task: TabularTask, rows: int | None, seed: int) -> Rows:
        return generated_answers(task.problem, rows or DEFAULT_ROWS, seed)

    def answer_columns(self, task: TabularTask, rows: Rows) -> tuple[str, ...]:
        compared = parse_comparison(task.target, rows.columns, "task.target")
        if compared.sign and task.problem == "regression":
            raise DataError(
                f"task.target is {task.target!r}, which makes classes, and task.problem is 'regression': name the "
                "column alone"
            )
        return (compared.column,)

    def answer(self, task: TabularTask, cells: Mapping[str, str]) -> str | float:
        compared = parse_comparison(task.target, tuple(cells), "task.target")
        cell = cells[compared.column]
        if task.problem == "regression":
            try:
                return number_of(cell)
            except ValueError:
                raise ValueError(f"the target is {cell!r}, and a finite number was expected") from None
        return str(int(compared.holds(cell))) if compared.sign else canonical(cell)

    def describe(self, task: TabularTask, answers: Sequence[Any]) -> dict[str, Any]:
        common = {"problem": task.problem, "target": task.target, "bias": True}
        if task.problem == "regression":
            deviation = float(np.std(answers))
            if deviation == 0:
                raise DataError(f"the target is {answers[0]} in all training rows: there is nothing to learn")
            return {**common, "outputs": 1, "mean": float(np.mean(answers)), "deviation": deviation}
        classes = sorted(set(answers))
        if not 2 <= len(classes) <= LARGEST_CLASSES:
            raise DataError(
                f"the target has {len(classes)} different values in the training rows, and 2 to {LARGEST_CLASSES} "
                "make classes: choose another task.target, or task.problem=regression"
            )
        return {**common, "outputs": 1 if len(classes) == 2 else len(classes), "classes": classes}

    def arrays(
        self, table: Mapping[str, Any], answers: Sequence[Any]
    ) -> tuple[Arrays, npt.NDArray[np.bool_]]:
        """`target`: int64 class numbers, or fp32 standardized values."""
        if table["problem"] == "regression":
            scaled = (np.array(answers, dtype=np.float64) - table["mean"]) / table["deviation"]
            return {"target": scaled.astype(np.float32)}, np.ones(len(answers), dtype=np.bool_)
        number = {name: i for i, name in enumerate(table["classes"])}
        labels = np.array([number.get(answer, -1) for answer in answers], dtype=np.int64)
        return {"target": labels[labels >= 0]}, labels >= 0

    def make(
        self,
        settings: TabularTask,
        table: dict[str, Any],
        statistics: Statistics,
        splits: Mapping[str, Batch],
        warnings: tuple[str, ...],
    ) -> Task:
        return Tabular(settings, table, statistics, splits, warnings)


FAMILY = TabularFamily()


class Tabular(TableTask):
    """An opened tabular task."""

    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy in nats, or mean squared error of the standardized target."""
        target = batch["target"]
        if self.table["problem"] == "regression":
            return F.mse_loss(outputs[:, 0], target)
        if self.table["outputs"] == 1:
            return F.binary_cross_entropy_with_logits(outputs[:, 0], target.float())
        return F.cross_entropy(outputs, target)

    def figures(self, outputs: npt.NDArray[np.float64], answers: Arrays) -> dict[str, float | None]:
        predictions, target = _predictions(self.table, outputs), answers["target"]
        if self.table["problem"] == "regression":
            seen = target.astype(np.float64) * self.table["deviation"] + self.table["mean"]
            return {"r2": r2(predictions, seen), "rmse": rmse(predictions, seen)}
        return {
            "accuracy": accuracy(predictions, target),
            "auc": mean_auc(predictions, target),
            "brier": brier(predictions, target),
        }


def predict(directory: Path, rows: Sequence[Mapping[str, str | float | None]]) -> npt.NDArray[np.float64]:
    """What a model that `save_pretrained` wrote says of `rows` (column -> value; None or "" where missing).

    Classification: probabilities [N, C], classes in the order of table.json. Regression: values [N], in the
    target's unit. Raises DataError.
    """
    table, outputs = saved_outputs(directory, rows, "tabular")
    return _predictions(table, outputs)


def _predictions(table: Mapping[str, Any], outputs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if table["problem"] == "regression":
        values: npt.NDArray[np.float64] = outputs[:, 0] * table["deviation"] + table["mean"]
        return values
    if table["outputs"] == 1:  # the logit of the second class
        outputs = np.column_stack([np.zeros(len(outputs)), outputs[:, 0]])
    return torch.softmax(torch.from_numpy(outputs), dim=1).numpy()
