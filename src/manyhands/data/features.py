"""From typed columns to a matrix of features, by statistics of the training rows.

The statistics are a value of their own (`Statistics`), written as statistics.json: what a model learned on
must be known to whoever uses it later, and sites that train together can agree on statistics instead of each
using its own (task.features.statistics).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.data.tables import Numbers, Texts
from manyhands.errors import DataError
from manyhands.plan.tables import Features

VERSION = 1
MISSING = "?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of the table. `fill` stands for a missing number; `categories` is None for a numeric column;
    `indicator`: one more feature says that the value is missing.
    """

    name: str
    fill: float = 0.0
    categories: tuple[str, ...] | None = None
    indicator: bool = False

    def features(self) -> tuple[str, ...]:
        own = (self.name,) if self.categories is None else tuple(f"{self.name}={c}" for c in self.categories)
        return (*own, f"{self.name}={MISSING}") if self.indicator else own


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """A feature is (value - mean) / deviation; 0 and 1 where it is used as it is."""

    columns: tuple[Column, ...]
    means: tuple[float, ...]  # by feature
    deviations: tuple[float, ...]

    def features(self) -> tuple[str, ...]:
        return tuple(name for column in self.columns for name in column.features())

    def matrix(self, numbers: Mapping[str, Numbers], texts: Mapping[str, Texts]) -> npt.NDArray[np.float32]:
        """fp32 [rows, features], computed in fp64."""
        raw = _raw(self.columns, numbers, texts)
        scaled: Numbers = (raw - np.array(self.means)) / np.array(self.deviations)
        return scaled.astype(np.float32)

    def as_json(self) -> dict[str, Any]:
        """Plain data; floats are written so that they are read back exactly."""
        return {
            "version": VERSION,
            "columns": [
                {
                    "name": c.name,
                    "fill": c.fill,
                    "categories": None if c.categories is None else list(c.categories),
                    "indicator": c.indicator,
                }
                for c in self.columns
            ],
            "features": [
                {"name": name, "mean": mean, "deviation": deviation}
                for name, mean, deviation in zip(self.features(), self.means, self.deviations, strict=True)
            ],
        }


def measure(
    features: Features, names: tuple[str, ...], numbers: Mapping[str, Numbers], texts: Mapping[str, Texts]
) -> Statistics:
    """The statistics of these (training) rows; `names` are the columns in order.

    Deviations are those of the population; that of a constant feature is taken as 1. Raises DataError for a
    column without any value.
    """
    indicator = features.on_missing == "indicator"
    columns = tuple(_column(name, numbers, texts, indicator, features.drop_first) for name in names)
    raw = _raw(columns, numbers, texts)
    kinds = [
        column.categories is None and i == 0 for column in columns for i, _ in enumerate(column.features())
    ]
    if features.standardize == "all":
        kinds = [True] * len(kinds)
    elif features.standardize == "none":
        kinds = [False] * len(kinds)
    means = np.where(kinds, raw.mean(axis=0), 0.0)
    deviations = raw.std(axis=0)
    deviations = np.where(kinds & (deviations > 1e-12), deviations, 1.0)
    return Statistics(columns=columns, means=tuple(means.tolist()), deviations=tuple(deviations.tolist()))


def read_statistics(
    path: Path, features: Features, names: tuple[str, ...], setting: str = "task.features.statistics"
) -> Statistics:
    """Agreed statistics for the columns `names`. `setting`: what named the file. Raises DataError if the file is
    none, or is of other columns.
    """
    try:
        statistics = statistics_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{setting} {path}: {error}; give a statistics.json as a run writes it") from error
    categorical, indicator = set(features.categorical), features.on_missing == "indicator"
    wanted = {(name, name in categorical, indicator) for name in names}
    found = {(c.name, c.categories is not None, c.indicator) for c in statistics.columns}
    if odd := sorted(wanted ^ found):
        raise DataError(
            f"{setting} {path}: the column {odd[0][0]!r} is another there (its name, whether it is "
            "categorical, or on_missing); statistics and settings must agree"
        )
    return statistics


def statistics_from(data: Mapping[str, Any]) -> Statistics:
    """What `as_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']!r}, and {VERSION} was expected")
    columns = tuple(
        Column(
            name=str(c["name"]),
            fill=float(c["fill"]),
            categories=None if c["categories"] is None else tuple(map(str, c["categories"])),
            indicator=bool(c["indicator"]),
        )
        for c in data["columns"]
    )
    statistics = Statistics(
        columns=columns,
        means=tuple(float(f["mean"]) for f in data["features"]),
        deviations=tuple(float(f["deviation"]) for f in data["features"]),
    )
    if statistics.features() != tuple(f["name"] for f in data["features"]):
        raise ValueError("its features are not those of its columns")
    if not all(0 < d < np.inf for d in statistics.deviations) or not np.isfinite(statistics.means).all():
        raise ValueError("means must be finite, deviations above zero")
    return statistics


def missing_any(
    names: tuple[str, ...], numbers: Mapping[str, Numbers], texts: Mapping[str, Texts], rows: int
) -> npt.NDArray[np.bool_]:
    """Which rows lack a value of one of the columns."""
    lacking = np.zeros(rows, dtype=np.bool_)
    for name in names:
        lacking |= _is_missing(name, numbers, texts)
    return lacking


def _is_missing(
    name: str, numbers: Mapping[str, Numbers], texts: Mapping[str, Texts]
) -> npt.NDArray[np.bool_]:
    if name in numbers:
        return np.isnan(numbers[name])
    return np.array([text is None for text in texts[name]], dtype=np.bool_)


def _column(
    name: str, numbers: Mapping[str, Numbers], texts: Mapping[str, Texts], indicator: bool, drop_first: bool
) -> Column:
    if _is_missing(name, numbers, texts).all():
        raise DataError(
            f"the column {name!r} has no value in any training row: leave it out with task.features.without"
        )
    if name in numbers:
        return Column(name=name, fill=float(np.nanmean(numbers[name])), indicator=indicator)
    categories = sorted({str(text) for text in texts[name] if text is not None})
    return Column(name=name, categories=tuple(categories[1 if drop_first else 0 :]), indicator=indicator)


def _raw(columns: tuple[Column, ...], numbers: Mapping[str, Numbers], texts: Mapping[str, Texts]) -> Numbers:
    """[rows, features] before means and deviations."""
    parts: list[npt.NDArray[Any]] = []
    for column in columns:
        missing = _is_missing(column.name, numbers, texts)
        if column.categories is None:
            parts.append(np.where(missing, column.fill, numbers[column.name]))
        else:
            parts += [texts[column.name] == category for category in column.categories]
        if column.indicator:
            parts.append(missing)
    if not parts:
        raise DataError("there are no features: name columns in task.features.columns")
    return np.column_stack(parts).astype(np.float64)
