"""The table of a training: when a row begins, what stands in it, and several trainings in one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from manyhands.ui.host_sweep import SweepScreen
from manyhands.ui.training_table import TrainingTable, table_of

BEGAN = 1_700_000_000_000


def step(number: int, at_s: float, loss: float | None = 1.0, **fields: Any) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "time_ms": BEGAN + round(at_s * 1000),
        "loss": loss,
        "learning_rate": 3e-4,
        **fields,
    }


def table(*events: dict[str, Any], samples_per_step: int = 8) -> TrainingTable:
    found = TrainingTable(samples_per_step)
    found.take({"kind": "started", "step": 0, "time_ms": BEGAN})
    for event in events:
        found.take(event)
    return found


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ([1, 20, 59], 1),
        ([1, 20, 59, 60, 119, 121], 3),
        ([60 * minute + 1 for minute in range(60)], 60),
        ([3601, 3700, 4199, 4200, 4799, 4801], 3),
    ],
)
def test_a_row_each_minute_and_after_an_hour_each_ten(seconds: list[float], rows: int) -> None:
    found = table(*(step(n + 1, s) for n, s in enumerate(seconds)))
    assert len(found.rows) == rows
    assert found.rows[-1].samples == len(seconds) * 8  # the last one changes in place


def test_what_stands_in_a_row() -> None:
    found = table(
        step(10, 10, 2.0),
        {"kind": "evaluation", "set": "validation", "step": 10, "loss": 1.9, "metrics": {"accuracy": 0.75}},
        {"kind": "evaluation", "set": "other", "step": 10, "loss": 7.0, "metrics": {"accuracy": 0.1}},
        step(70, 70, 1.5),
        step(90, 80, 1.25, losses={"value": 0.5, "policy": 0.75}),
    )
    first, last = found.rows
    assert (first.samples, first.samples_per_s, first.change) == (80, 8.0, None)
    assert first.metrics == {"validation loss": 1.9, "accuracy": 0.75}
    assert (last.samples, last.change) == (720, -0.75), "the change is to the row before"
    assert last.samples_per_s == pytest.approx(80 * 8 / 70), "of the row, not of its last report"
    assert last.metrics == {"validation loss": 1.9, "accuracy": 0.75}
    assert last.losses == {"value": 0.5, "policy": 0.75}
    assert last.elapsed_ms == 80_000
    found.take({"kind": "evaluation", "set": "validation", "step": 90, "loss": 1.1, "metrics": {}})
    assert found.rows[-1].metrics == {"validation loss": 1.1}, "the end's stands in the last row"


def test_a_training_that_goes_on_and_figures_that_are_not_known() -> None:
    found = TrainingTable(2)
    found.take({"kind": "started", "step": 100, "time_ms": BEGAN})
    found.take(step(110, 5, None))
    found.take(step(120, 70, 1.0))
    assert found.rows[0].samples_per_s == 4.0
    assert (found.rows[0].loss, found.rows[1].change) == (None, None)


def test_steps_that_are_taken_again_are_not_counted_twice() -> None:
    found = table(step(1200, 61))
    found.take({"kind": "started", "step": 500, "time_ms": BEGAN + 70_000})
    found.take(step(600, 80))
    assert found.rows[-1].samples_per_s == 80.0


def test_several_trainings_share_a_table() -> None:
    tables = [table(*(step(n, 60 * n) for n in range(1, 20))) for _ in range(3)]
    for found, name in zip(tables, ("a lr=1", "b lr=2", "c \x1b[2J"), strict=True):
        found.name = name
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table_of(tables, rows=6))
    lines = capture.get().splitlines()
    assert lines[0].split() == ["run", "time", "seconds", "samples", "samples/s", "change", "loss", "LR"]
    assert len(lines) == 7
    assert "\x1b[2J" not in capture.get()
    assert lines[-1].split()[3:] == ["1,140", "152", "0", "+0.0000", "1.0000", "0.0003"]


def test_of_more_trainings_than_fit_those_that_go_on_come_first() -> None:
    screen = SweepScreen("none")
    for number in range(60):
        one = screen.add(f"run{number}", 8)
        screen.take(one, step(10, 10, 2.0))
        if number < 55:
            screen.take(one, {"kind": "finished", "time_ms": BEGAN, "step": 10})
    drawn = Console(width=2000, file=io.StringIO())
    drawn.print(screen._panel())
    lines = drawn.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split()[0] for line in lines[2:8]] == ["run55", "run56", "run57", "run58", "run59", "run0"]
