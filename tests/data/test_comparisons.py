from __future__ import annotations

import pytest

from manyhands.data.comparisons import parse_comparison
from manyhands.errors import DataError

COLUMNS = ("num", "stage of it", "a > b")


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("num > 0", {"0": False, "0.0": False, "1": True, "4": True}),
        ("num>=2", {"1.9": False, "2": True}),
        ("num < -1", {"-2": True, "-1": False}),
        ("num<=1e3", {"1000": True, "1001": False}),
        ("num == 1", {"1.0": True, "2": False, "x": False}),
        ("stage of it != 'III'", {"III": False, "II": True}),
    ],
)
def test_cells_are_compared(text: str, cells: dict[str, bool]) -> None:
    comparison = parse_comparison(text, COLUMNS, "task.target")
    assert {cell: comparison.holds(cell) for cell in cells} == cells


def test_a_column_of_that_very_name_comes_first() -> None:
    assert parse_comparison("a > b", COLUMNS, "task.target").sign == ""


def test_what_cannot_be_compared() -> None:
    with pytest.raises(DataError, match=r"task\.target is 'nun > 0'.*no column 'nun'.*Did you mean 'num'"):
        parse_comparison("nun > 0", COLUMNS, "task.target")
    with pytest.raises(DataError, match="'old' is no number; use == or !="):
        parse_comparison("num > old", COLUMNS, "task.target")
    with pytest.raises(ValueError, match="'x', which cannot be compared by > 0"):
        parse_comparison("num > 0", COLUMNS, "task.target").holds("x")
