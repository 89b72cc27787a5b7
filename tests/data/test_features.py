from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.data.features import Statistics, measure, missing_any, read_statistics, statistics_from
from manyhands.data.tables import Numbers, Texts
from manyhands.errors import DataError
from manyhands.plan.tables import Features

NUMBERS: dict[str, Numbers] = {"n": np.array([1.0, np.nan, 3.0, 8.0])}
TEXTS: dict[str, Texts] = {"c": np.array(["b", "a", None, "b"], dtype=object)}


def measured(**changes: Any) -> Statistics:
    return measure(Features(categorical=("c",), **changes), ("n", "c"), NUMBERS, TEXTS)


def test_numbers_are_standardized_and_categories_are_one_hot() -> None:
    statistics = measured()
    assert statistics.features() == ("n", "c=a", "c=b")
    matrix = statistics.matrix(NUMBERS, TEXTS)
    assert matrix.dtype == np.float32
    filled = np.array([1, 4, 3, 8])
    np.testing.assert_allclose(matrix[:, 0], (filled - 4) / filled.std(), rtol=1e-6)
    assert matrix[:, 1:].tolist() == [[0, 1], [1, 0], [0, 0], [0, 1]]


def test_other_rows_are_measured_by_the_training_rows_and_unknown_categories_are_zeros() -> None:
    statistics = measured(standardize="none")
    others = statistics.matrix({"n": np.array([np.nan, 5])}, {"c": np.array(["z", "b"], dtype=object)})
    assert others.tolist() == [[4, 0, 0], [5, 0, 1]]


def test_indicators_dropped_first_categories_and_all_standardized() -> None:
    statistics = measured(on_missing="indicator", drop_first=True, standardize="none")
    assert statistics.features() == ("n", "n=?", "c=b", "c=?")
    assert statistics.matrix(NUMBERS, TEXTS)[:, 1:].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 0]]
    matrix = measured(standardize="all").matrix(NUMBERS, TEXTS)
    np.testing.assert_allclose(matrix.mean(axis=0), 0, atol=1e-7)
    np.testing.assert_allclose(matrix.std(axis=0), 1, rtol=1e-6)


def test_a_constant_column_does_not_divide_by_zero() -> None:
    statistics = measure(Features(), ("k",), {"k": np.full(5, 0.1)}, {})
    assert statistics.deviations == (1.0,)
    assert np.abs(statistics.matrix({"k": np.full(5, 0.1)}, {})).max() < 1e-6


def test_a_column_without_values_is_refused() -> None:
    with pytest.raises(DataError, match="'n' has no value in any training row"):
        measure(Features(), ("n",), {"n": np.full(3, np.nan)}, {})
    assert missing_any(("n", "c"), NUMBERS, TEXTS, 4).tolist() == [False, True, True, False]


def test_statistics_are_read_back_exactly_and_must_fit(tmp_path: Path) -> None:
    statistics = measured(standardize="all", on_missing="indicator")
    assert statistics_from(json.loads(json.dumps(statistics.as_json()))) == statistics
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(statistics.as_json()))
    agreed = Features(categorical=("c",), on_missing="indicator", statistics=str(path))
    assert read_statistics(path, agreed, ("n", "c")) == statistics
    for features, names in (
        (agreed, ("n",)),
        (Features(categorical=("c",)), ("n", "c")),
        (Features(categorical=("n", "c"), on_missing="indicator"), ("n", "c")),
    ):
        with pytest.raises(DataError, match="must agree"):
            read_statistics(path, features, names)
    wrong = statistics.as_json()
    wrong["features"][0]["deviation"] = 0.0
    path.write_text(json.dumps(wrong))
    with pytest.raises(DataError, match="deviations above zero"):
        read_statistics(path, agreed, ("n", "c"))
    path.write_text("{}")
    with pytest.raises(DataError, match=r"statistics\.json as a run writes it"):
        read_statistics(path, agreed, ("n", "c"))
