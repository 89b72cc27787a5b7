"""What the two table tasks (tabular, survival) have in common: from rows to materials, the model, its metrics
and what is saved of it.

Materials: training.safetensors and validation.safetensors (features fp32 [N, F] and the answers of the task),
statistics.json (how columns became features), table.json (the model's shape and what its answers mean) and
record.json (how many rows of which files went where, and what was broken). Same plan and same files: same
bytes. A client never reads the CSV files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manyhands.data.features import Statistics, measure, missing_any, read_statistics, statistics_from
from manyhands.data.tables import Faults, Int64s, Rows, Split, read_rows, split_rows, typed_columns
from manyhands.errors import DataError, PlanError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.plan.tables import SurvivalTask, TabularTask
from manyhands.tasks.protocol import TRAINING, VALIDATION, Batch, Loss, Metrics, Prepared, Task

STATISTICS, TABLE, RECORD = "statistics.json", "table.json", "record.json"
DATA = {TRAINING: "training.safetensors", VALIDATION: "validation.safetensors"}
FIRST_WEIGHTS, WEIGHTS = "first.safetensors", "model.safetensors"
FEATURES = "features"

Arrays = Mapping[str, npt.NDArray[Any]]
Settings = TypeVar("Settings", TabularTask, SurvivalTask)


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


def model_of(table: Mapping[str, Any], features: int) -> TableModel:
    """A new model of the shape that table.json says."""
    return TableModel(features, table["hidden_sizes"], table["outputs"], bias=table["bias"])


# ------------------------------------------------------------------------------ preparing and opening
class TableFamily(ABC, Generic[Settings]):
    """How a table task is prepared; each of the two says what its answers are."""

    settings_class: type[Settings]

    @abstractmethod
    def generated(self, task: Settings, rows: int | None, seed: int) -> Rows:
        """The table where no files are given."""

    @abstractmethod
    def answer_columns(self, task: Settings, rows: Rows) -> tuple[str, ...]:
        """Columns that hold the answers, and hence are no features. Raises DataError."""

    @abstractmethod
    def answer(self, task: Settings, cells: Mapping[str, str]) -> Any:
        """The answer in a row's answer columns. Raises ValueError that says what is wrong with them."""

    @abstractmethod
    def describe(self, task: Settings, answers: Sequence[Any]) -> dict[str, Any]:
        """For table.json, from the training rows: `outputs`, `bias`, and what the answers mean."""

    @abstractmethod
    def arrays(
        self, table: Mapping[str, Any], answers: Sequence[Any]
    ) -> tuple[Arrays, npt.NDArray[np.bool_]]:
        """The answers as arrays over the rows that can be used, and which rows those are."""

    @abstractmethod
    def make(self, table: dict[str, Any], statistics: Statistics, splits: Mapping[str, Batch]) -> Task:
        """The opened task."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Write materials and first weights into `directory`. Raises DataError for the table."""
        task = self._settings(plan)
        directory.mkdir(parents=True, exist_ok=True)
        faults = Faults(stop=task.table.on_broken == "stop")
        if task.table.files:
            rows = read_rows(task.table, faults)
        else:
            rows = self.generated(task, task.table.generated_rows, plan.seed)
        split = split_rows(rows, task.split, plan.seed)
        loaded = self._load(task, rows, split, faults)
        _write_json(directory / STATISTICS, loaded.statistics.as_json())
        _write_json(directory / TABLE, loaded.table)
        _write_json(directory / RECORD, _record(task, rows, split, loaded, faults))
        for name, arrays in loaded.splits.items():
            save_file({key: torch.from_numpy(value) for key, value in arrays.items()}, directory / DATA[name])
        return self._with_model(plan.seed, directory, len(loaded.splits[TRAINING][FEATURES]))

    def without_data(self, plan: Plan, materials: Path, directory: Path) -> None:  # noqa: ARG002
        """How columns became features, the record, and one row of each split."""
        for name in (STATISTICS, TABLE, RECORD):
            shutil.copyfile(materials / name, directory / name)
        for name in DATA.values():
            save_file(
                {key: rows[:1].clone() for key, rows in _rows_of(materials / name).items()}, directory / name
            )

    def prepare_model(self, plan: Plan, directory: Path) -> Prepared:
        """Other hidden layers over the same rows. Raises DataError, PlanError."""
        task = self._settings(plan)
        table, _ = read_description(directory)
        _write_json(directory / TABLE, {**table, "hidden_sizes": list(task.hidden_sizes)})
        return self._with_model(plan.seed, directory, 0)

    def _with_model(self, seed: int, directory: Path, samples: int) -> Prepared:
        """Write the first weights of the model that table.json describes."""
        table, statistics = read_description(directory)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parameters = dict(model_of(table, len(statistics.features())).named_parameters())
        save_file({name: p.detach() for name, p in parameters.items()}, directory / FIRST_WEIGHTS)
        return Prepared(
            materials={name: directory / name for name in (*DATA.values(), STATISTICS, TABLE, RECORD)},
            samples=samples,
            parameters=tuple(Parameter(name=name, shape=tuple(p.shape)) for name, p in parameters.items()),
            first_weights=directory / FIRST_WEIGHTS,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over materials that `prepare` wrote. Raises DataError if one is missing or not whole."""
        self._settings(plan)
        table, statistics = read_description(materials)
        splits = {name: _rows_of(materials / file) for name, file in DATA.items()}
        return self.make(table, statistics, splits)

    def _settings(self, plan: Plan) -> Settings:
        if not isinstance(plan.task, self.settings_class):
            family = self.settings_class().name
            raise PlanError(f"task.name is {plan.task.name!r}, and this is the family of {family}")
        return plan.task

    def _load(self, task: Settings, rows: Rows, split: Split, faults: Faults) -> _Loaded:
        """Typed columns, answers, statistics of the training rows, and the arrays of both splits."""
        answer_columns = self.answer_columns(task, rows)
        names = _feature_names(task, rows, answer_columns)
        categorical = tuple(name for name in names if name in task.features.categorical)
        numeric = tuple(name for name in names if name not in categorical)
        used = np.sort(np.concatenate([split.training, split.validation]))
        rows = _rows_at(rows, used)
        numbers, texts, sound = typed_columns(rows, numeric, categorical, faults)
        lacking = np.zeros(len(used), dtype=np.bool_)
        if task.features.on_missing == "drop":
            lacking = missing_any(names, numbers, texts, len(used))
        answers, answered, broken = self._answers(task, rows, answer_columns, sound, faults)
        usable = sound & answered & ~broken & ~lacking
        parts = {
            TRAINING: np.flatnonzero(np.isin(used, split.training) & usable),
            VALIDATION: np.flatnonzero(np.isin(used, split.validation) & usable),
        }
        for name, part in parts.items():
            if not len(part):
                raise DataError(
                    f"no row is left for {name}: all lack a value, or are broken; see task.features.on_missing"
                )

        def columns_of(part: Int64s) -> tuple[dict[str, Any], dict[str, Any]]:
            return {n: c[part] for n, c in numbers.items()}, {n: c[part] for n, c in texts.items()}

        if task.features.statistics is None:
            statistics = measure(task.features, names, *columns_of(parts[TRAINING]))
        else:
            statistics = read_statistics(Path(task.features.statistics).expanduser(), task.features, names)
        table = {
            "version": 1,
            "task": task.name,
            "hidden_sizes": list(task.hidden_sizes),
            **self.describe(task, [answers[i] for i in parts[TRAINING]]),
        }
        splits, unknown = {}, 0
        for name, part in parts.items():
            arrays, known = self.arrays(table, [answers[i] for i in part])
            splits[name] = {FEATURES: statistics.matrix(*columns_of(part[known])), **arrays}
            unknown += int((~known).sum())
        if not len(splits[VALIDATION][FEATURES]):
            raise DataError(
                "no validation row is left: their targets are not among those of the training rows"
            )
        dropped = {
            "missing target": int((sound & ~answered).sum()),
            "missing value": int((sound & answered & ~broken & lacking).sum()),
            "target not in the training rows": unknown,
        }
        return _Loaded(table=table, statistics=statistics, splits=splits, dropped=dropped)

    def _answers(
        self,
        task: Settings,
        rows: Rows,
        columns: tuple[str, ...],
        sound: npt.NDArray[np.bool_],
        faults: Faults,
    ) -> tuple[list[Any], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Each row's answer, which rows have one, and in which it is broken."""
        answers: list[Any] = [None] * len(rows.cells)
        answered, broken = np.zeros(len(rows.cells), np.bool_), np.zeros(len(rows.cells), np.bool_)
        at = {name: rows.columns.index(name) for name in columns}
        for i in np.flatnonzero(sound):
            cells = {name: cell for name, place in at.items() if (cell := rows.cells[i][place]) is not None}
            answered[i] = len(cells) == len(columns)
            if not answered[i]:
                continue
            try:
                answers[i] = self.answer(task, cells)
            except ValueError as error:
                faults.found(rows.places[i], str(error))
                broken[i] = True
        return answers, answered, broken


def _rows_of(file: Path) -> dict[str, torch.Tensor]:
    """Features and answers of a split. Raises DataError."""
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        raise DataError(f"the table in {file}: {error}; fetch the run's materials again") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    table: dict[str, Any]
    statistics: Statistics
    splits: dict[str, dict[str, npt.NDArray[Any]]]
    dropped: dict[str, int]


def _feature_names(task: TabularTask | SurvivalTask, rows: Rows, answers: tuple[str, ...]) -> tuple[str, ...]:
    """The columns to learn from, in order. Raises DataError for one that is not there or holds an answer."""
    features = task.features
    for setting in ("columns", "without", "categorical"):
        for name in getattr(features, setting):
            rows.position(name, f"task.features.{setting}")
    own = {name for name in (task.split.key, task.split.column) if name is not None}
    names = features.columns or tuple(
        name for name in rows.columns if name not in {*answers, *own, *features.without}
    )
    if told := set(names) & set(answers):
        raise DataError(
            f"task.features.columns names {min(told)!r}, which is what is to be predicted: leave it out"
        )
    if idle := set(features.categorical) - set(names):
        raise DataError(f"task.features.categorical names {min(idle)!r}, which is no feature: leave it out")
    return names


def _rows_at(rows: Rows, numbers: Int64s) -> Rows:
    return Rows(
        columns=rows.columns,
        cells=tuple(rows.cells[i] for i in numbers),
        places=tuple(rows.places[i] for i in numbers),
    )


def _record(
    task: TabularTask | SurvivalTask, rows: Rows, split: Split, loaded: _Loaded, faults: Faults
) -> dict[str, Any]:
    files = [Path(file).expanduser() for file in task.table.files]
    return {
        "version": 1,
        "source": [
            {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files
        ]
        or "generated",
        "rows": len(rows.cells),
        "training": len(loaded.splits[TRAINING][FEATURES]),
        "validation": len(loaded.splits[VALIDATION][FEATURES]),
        "left_out_by_split": split.left_out,
        "dropped": loaded.dropped,
        "broken": {"count": faults.count, "listed": faults.listed},
    }


# ------------------------------------------------------------------------------ the opened task
class TableTask(ABC):
    """An opened table task; implements tasks.protocol.Task."""

    def __init__(self, table: dict[str, Any], statistics: Statistics, splits: Mapping[str, Batch]) -> None:
        self.table, self.statistics, self.splits = table, statistics, splits
        self.unit = "samples"
        self.evaluation_sets: tuple[str, ...] = (VALIDATION,)

    @abstractmethod
    def loss_of(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean loss of fp32 outputs [B, outputs], scalar."""

    @abstractmethod
    def figures(self, outputs: npt.NDArray[np.float64], answers: Arrays) -> dict[str, float | None]:
        """Name -> figure over a whole split; None where it is not defined."""

    def build_model(self) -> torch.nn.Module:
        return model_of(self.table, len(self.statistics.features()))

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
        """model.safetensors, statistics.json and table.json: what `predict` needs."""
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        _write_json(directory / STATISTICS, self.statistics.as_json())
        _write_json(directory / TABLE, self.table)


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


# ------------------------------------------------------------------------------ what was saved
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
    model = model_of(table, len(statistics.features()))
    model.load_state_dict(load_file(directory / WEIGHTS))
    with torch.inference_mode():
        outputs = model.eval()(torch.from_numpy(statistics.matrix(numbers, texts)))
    return table, outputs.double().numpy()


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
