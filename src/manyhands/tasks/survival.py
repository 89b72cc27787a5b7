"""The survival task: Cox proportional hazards on the rows of a table, linear or with hidden layers.

The loss is the negative log partial likelihood with Breslow's way of ties: everybody whose time is not
earlier is at risk, at equal times too. The batch is the risk set, so a batch should be large enough to have
events in it. It is a mean over samples, not over events: a batch without an event has the loss 0, with a
gradient of zeros, and still counts its samples, so steps and averages need no special case.
Figure: c_index, Harrell's concordance.

Sources: Cox 1972, "Regression models and life-tables"; Breslow 1974, "Covariance analysis of censored
survival data".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.comparisons import parse_comparison
from manyhands.data.features import Statistics
from manyhands.data.generated_tables import DEFAULT_ROWS, generated_survival
from manyhands.data.tables import Rows, number_of
from manyhands.errors import DataError
from manyhands.plan.tables import SurvivalTask
from manyhands.tasks.protocol import Batch, Task
from manyhands.tasks.scores import concordance_index
from manyhands.tasks.tables.family import TableFamily
from manyhands.tasks.tables.opened import Arrays, TableTask
from manyhands.tasks.tables.saved import saved_outputs


class SurvivalFamily(TableFamily[SurvivalTask]):
    """How survival tasks are prepared and opened."""

    settings_class = SurvivalTask

    def generated(self, task: SurvivalTask, rows: int | None, seed: int) -> Rows:  # noqa: ARG002
        return generated_survival(rows or DEFAULT_ROWS, seed)

    def answer_columns(self, task: SurvivalTask, rows: Rows) -> tuple[str, ...]:
        rows.position(task.time, "task.time")
        return (task.time, parse_comparison(task.event, rows.columns, "task.event").column)

    def answer(self, task: SurvivalTask, cells: Mapping[str, str]) -> tuple[float, bool]:
        compared = parse_comparison(task.event, tuple(cells), "task.event")
        try:
            time = number_of(cells[task.time])
        except ValueError:
            time = -1.0
        if time < 0:
            raise ValueError(f"the time is {cells[task.time]!r}, and a number not below zero was expected")
        cell = cells[compared.column]
        if compared.sign:
            return time, compared.holds(cell)
        try:
            event = number_of(cell)
        except ValueError:
            event = -1.0
        if event not in (0.0, 1.0):
            raise ValueError(
                f"the event is {cell!r}, and 0 or 1 was expected; for other values compare, as in "
                "task.event='status == dead'"
            )
        return time, event == 1.0

    def describe(self, task: SurvivalTask, answers: Sequence[Any]) -> dict[str, Any]:
        if not any(event for _, event in answers):
            raise DataError(
                f"no training row has an event (task.event is {task.event!r}): there is nothing to learn from"
            )
        return {"time": task.time, "event": task.event, "outputs": 1, "bias": False}

    def arrays(
        self,
        table: Mapping[str, Any],  # noqa: ARG002 - it says nothing about times
        answers: Sequence[Any],
    ) -> tuple[Arrays, npt.NDArray[np.bool_]]:
        """`time`: fp64, so that no two times become one; `event`: bool."""
        times = np.array([time for time, _ in answers], dtype=np.float64)
        events = np.array([event for _, event in answers], dtype=np.bool_)
        return {"time": times, "event": events}, np.ones(len(answers), dtype=np.bool_)

    def make(
        self,
        settings: SurvivalTask,
        table: dict[str, Any],
        statistics: Statistics,
        splits: Mapping[str, Batch],
        warnings: tuple[str, ...],
    ) -> Task:
        return Survival(settings, table, statistics, splits, warnings)


FAMILY = SurvivalFamily()


class Survival(TableTask):
    """An opened survival task."""

    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return cox_loss(outputs[:, 0], batch["time"], batch["event"])

    def figures(self, outputs: npt.NDArray[np.float64], answers: Arrays) -> dict[str, float | None]:
        return {"c_index": concordance_index(outputs[:, 0], answers["time"], answers["event"])}


def cox_loss(log_hazards: torch.Tensor, times: torch.Tensor, events: torch.Tensor) -> torch.Tensor:
    """The negative log partial likelihood (Breslow) of a batch, divided by its size; scalar.

    log_hazards: float [B], up to a constant; times [B]; events: bool [B]. Without an event: 0, differentiable.
    """
    late_first = torch.argsort(times, descending=True, stable=True)
    ordered = log_hazards[late_first]
    falling = -times[late_first].contiguous()
    last_of_equals = torch.searchsorted(falling, falling, right=True) - 1
    at_risk = torch.logcumsumexp(ordered, dim=0)[last_of_equals]  # log of the sum over all not earlier
    return -((ordered - at_risk) * events[late_first]).sum() / len(ordered)


def predict(directory: Path, rows: Sequence[Mapping[str, str | float | None]]) -> npt.NDArray[np.float64]:
    """Log hazards [N] of `rows` (column -> value; None or "" where missing), up to a constant that is the same
    for all, by a model that `save_pretrained` wrote. Raises DataError.
    """
    return saved_outputs(directory, rows, "survival")[1][:, 0]
