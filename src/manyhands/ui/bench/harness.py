"""Measurements and how they are run: each in a process of its own, so that none sees another's memory or caches.

A measurement is a function without arguments that returns `Measured`. What it is called, its unit and its target
stand in `registry.py`. `met` is None where there is no target.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from manyhands.errors import WorkerError

TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`floor`: what the machine itself can do, in the same unit; `note`: what a reader must know of both.

    `value` is None where something is missing here that cannot be measured without; the note says what.
    """

    value: float | None
    floor: float | None = None
    note: str = ""
    target: float | None = None
    """Where the target depends on the floor; else the registry's holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    name: str
    function: str
    """module:function"""
    unit: str
    better: Literal["lower", "higher"]
    what: str
    target: float | None = None


def run_one(measurement: Measurement) -> dict[str, Any]:
    """Measure in a fresh process; the row: name, value, unit, target, floor, met, note."""
    module, _, function = measurement.function.partition(":")
    code = (
        f"from manyhands.ui.bench.harness import report; from {module} import {function}; report({function})"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise WorkerError(f"the measurement {measurement.name} took more than {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise WorkerError(f"the measurement {measurement.name} failed:\n{done.stderr[-3000:].rstrip()}")
    return row(measurement, Measured(**json.loads(done.stdout.splitlines()[-1])))


def row(measurement: Measurement, measured: Measured) -> dict[str, Any]:
    target = measured.target if measured.target is not None else measurement.target
    met: bool | None = None
    if target is not None and measured.value is not None:
        met = measured.value <= target if measurement.better == "lower" else measured.value >= target
    return {
        "name": measurement.name,
        "value": measured.value,
        "unit": measurement.unit,
        "target": target,
        "floor": measured.floor,
        "met": met,
        "note": measured.note,
    }


def report(function: Callable[[], Measured]) -> None:
    """In the measuring process: measure, and print the result as the last line of standard output."""
    measured = function()
    print(
        json.dumps(
            {
                "value": measured.value,
                "floor": measured.floor,
                "note": measured.note,
                "target": measured.target,
            },
            allow_nan=False,
        )
    )


def median_seconds(action: Callable[[], object], *, repeats: int, warm_up: int = 1) -> float:
    """The median wall time of an action, after a few that are not counted."""
    for _ in range(warm_up):
        action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
