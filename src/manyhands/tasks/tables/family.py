"""How the two table tasks (tabular, survival) are prepared and opened: from rows to materials.

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
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manyhands.data.features import Statistics, measure, missing_any
from manyhands.data.tables import (
    NAMED_FAULTS,
    Faults,
    Int64s,
    Rows,
    Split,
    read_rows,
    split_rows,
    typed_columns,
)
from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tables import SurvivalTask, TabularTask
from manyhands.tasks.first_weights import FIRST_WEIGHTS, write_first_weights
from manyhands.tasks.own_model import begun_model
from manyhands.tasks.protocol import TRAINING, VALIDATION, Batch, Prepared, Task
from manyhands.tasks.tables.model import (
    FEATURES,
    STATISTICS,
    TABLE,
    agreed_statistics,
    as_answered,
    check_alike,
    load_pretrained,
    model_of,
    read_description,
    sizes_of,
    write_json,
)
from manyhands.tasks.tables.opened import Arrays

RECORD = "record.json"
DATA = {TRAINING: "training.safetensors", VALIDATION: "validation.safetensors"}

Settings = TypeVar("Settings", TabularTask, SurvivalTask)


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
    def make(
        self,
        settings: Settings,
        table: dict[str, Any],
        statistics: Statistics,
        splits: Mapping[str, Batch],
        warnings: tuple[str, ...],
    ) -> Task:
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
        write_json(directory / STATISTICS, loaded.statistics.as_json())
        write_json(directory / TABLE, loaded.table)
        write_json(directory / RECORD, _record(task, rows, split, loaded, faults))
        for name, arrays in loaded.splits.items():
            save_file({key: torch.from_numpy(value) for key, value in arrays.items()}, directory / DATA[name])
        return self._with_model(plan, directory, len(loaded.splits[TRAINING][FEATURES]))

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
        table, statistics = read_description(directory)
        if task.weights is not None:
            check_alike(table, statistics, task.weights)
        write_json(directory / TABLE, {**table, "hidden_sizes": list(task.hidden_sizes)})
        return self._with_model(plan, directory, 0)

    def _with_model(self, plan: Plan, directory: Path, samples: int) -> Prepared:
        """Write the first weights of the model that table.json describes."""
        table, statistics = read_description(directory)
        model = begun_model(
            self._settings(plan),
            plan.seed,
            lambda: model_of(table, statistics),
            lambda place: (load_pretrained(place), sizes_of(*read_description(place))),
            sizes_of(table, statistics),
        )
        return Prepared(
            materials={name: directory / name for name in (*DATA.values(), STATISTICS, TABLE, RECORD)},
            samples=samples,
            parameters=write_first_weights(model, directory),
            first_weights=directory / FIRST_WEIGHTS,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over materials that `prepare` wrote. Raises DataError if one is missing or not whole."""
        settings = self._settings(plan)
        table, statistics = read_description(materials)
        splits = {name: _rows_of(materials / file) for name, file in DATA.items()}
        return self.make(settings, table, statistics, splits, _left_out(materials))

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

        statistics = agreed_statistics(task, names) or measure(
            task.features, names, *columns_of(parts[TRAINING])
        )
        table = {
            "version": 1,
            "task": task.name,
            "hidden_sizes": list(task.hidden_sizes),
            **self.describe(task, [answers[i] for i in parts[TRAINING]]),
        }
        if task.weights is not None:
            table = as_answered(table, task.weights)
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


def _left_out(materials: Path) -> tuple[str, ...]:
    """Which files and rows are not learned from, where there are any, in a sentence each."""
    try:
        record = json.loads((materials / RECORD).read_text(encoding="utf-8"))
        broken, listed = int(record["broken"]["count"]), [str(each) for each in record["broken"]["listed"]]
        files = [str(each) for each in record.get("broken_files", ())]
        dropped = {str(why): int(count) for why, count in record["dropped"].items() if count}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"material {materials / RECORD}: {error}; fetch the run's materials again") from error
    rows = [f"{count} for a {why}" for why, count in dropped.items()]
    if broken:
        rows.insert(0, _as_broken(broken, listed))
    parts = {"files": [_as_broken(len(files), files)] if files else [], "rows": rows}
    return tuple(f"{what} that are left out: {', '.join(why)}" for what, why in parts.items() if why)


def _as_broken(count: int, listed: Sequence[str]) -> str:
    more = ", ..." if count > len(listed[:NAMED_FAULTS]) else ""
    return f"{count} as broken ({'; '.join(listed[:NAMED_FAULTS])}{more})"


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
    files = [Path(file).expanduser() for file in task.table.files if file not in faults.files]
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
        "broken_files": list(faults.files.values()),
    }
