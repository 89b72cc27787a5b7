"""An opened table task, and its metrics. Shapes: B of a batch, F features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.features import Statistics
from manyhands.plan.tables import SurvivalTask, TabularTask
from manyhands.tasks.own_model import opened_model, save_model
from manyhands.tasks.protocol import TRAINING, VALIDATION, Batch, Loss, Metrics
from manyhands.tasks.tables.model import FEATURES, STATISTICS, TABLE, TableModel, model_of, write_json

Arrays = Mapping[str, npt.NDArray[Any]]


class TableTask(ABC):
    """An opened table task; implements tasks.protocol.Task."""

    def __init__(
        self,
        settings: TabularTask | SurvivalTask,
        table: dict[str, Any],
        statistics: Statistics,
        splits: Mapping[str, Batch],
        warnings: tuple[str, ...] = (),
    ) -> None:
        self.warnings = warnings  # implements Warns too
        self.settings, self.table, self.statistics, self.splits = settings, table, statistics, splits
        self.unit = "samples"
        self.evaluation_sets: tuple[str, ...] = (VALIDATION,)

    @abstractmethod
    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean loss of fp32 outputs [B, outputs], scalar."""

    @abstractmethod
    def figures(self, outputs: npt.NDArray[np.float64], answers: Arrays) -> dict[str, float | None]:
        """Name -> figure over a whole split; None where it is not defined."""

    def build_model(self) -> torch.nn.Module:
        return opened_model(self.settings, self._new_model)

    def _new_model(self) -> TableModel:
        return model_of(self.table, self.statistics)

    def samples(self, split: str = TRAINING) -> int:
        return len(self.splits[split][FEATURES])

    def tokens_per_sample(self) -> int:
        return 1

    def batch(self, indices: npt.NDArray[np.int64], split: str = TRAINING) -> Batch:
        """{"features": fp32 [B, F]} and the answers [B]."""
        chosen = torch.from_numpy(indices)
        return {name: tensor[chosen] for name, tensor in self.splits[split].items()}

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        return self.loss_and_outputs(model, batch)[0]

    def loss_and_outputs(self, model: torch.nn.Module, batch: Batch) -> tuple[Loss, torch.Tensor]:
        """The count is that of samples, so it is never 0 and batches average by their size."""
        outputs = model(batch[FEATURES]).float()
        return Loss(mean=self.loss_of(outputs, batch), count=len(outputs)), outputs

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002 - the same for all
        return TableMetrics(self)

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """The weights, statistics.json and table.json: what `predict` needs."""
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self.settings, self._new_model, weights, directory)
        write_json(directory / STATISTICS, self.statistics.as_json())
        write_json(directory / TABLE, self.table)


class TableMetrics(Metrics):
    """Keeps outputs and answers of all rows: the figures are of the whole, not means of batches."""

    def __init__(self, task: TableTask) -> None:
        super().__init__(task)
        self._table_task = task
        self._parts: list[dict[str, npt.NDArray[Any]]] = []

    def add(self, model: torch.nn.Module, batch: Batch) -> Loss:
        loss, outputs = self._table_task.loss_and_outputs(model, batch)
        part = {name: tensor.cpu().numpy() for name, tensor in batch.items() if name != FEATURES}
        self._parts.append({"outputs": outputs.detach().double().cpu().numpy(), **part})
        return loss

    def state(self) -> dict[str, npt.NDArray[Any]]:
        names = self._parts[0] if self._parts else ()
        return {name: np.concatenate([part[name] for part in self._parts]) for name in names}

    def merge(self, states: Sequence[Mapping[str, npt.NDArray[Any]]]) -> None:
        self._parts = [dict(state) for state in states if state]

    def values(self) -> dict[str, float]:
        state = self.state()
        if not state:
            return {}
        outputs = state.pop("outputs")
        figures = self._table_task.figures(outputs, state)
        return {name: value for name, value in figures.items() if value is not None}
