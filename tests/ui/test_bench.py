"""The harness, and the names that the project has promised; the figures themselves are for `manyhands bench`."""

from __future__ import annotations

import importlib
import json
import subprocess
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from manyhands.errors import WorkerError
from manyhands.ui.bench.harness import Measured, Measurement, row, run_one
from manyhands.ui.bench.registry import GROUPS
from manyhands.ui.bench.swarm import opening_intervals
from manyhands.ui.commands.bench import GROUPS as NAMES
from manyhands.ui.commands.bench import bench

Run = Callable[..., subprocess.CompletedProcess[str]]


def measurement(better: str, target: float | None = None) -> Measurement:
    return Measurement(name="m", function="x:y", unit="s", better=better, what="", target=target)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("better", "target", "value", "met"),
    [
        ("lower", 1.0, 0.9, True),
        ("lower", 1.0, 1.1, False),
        ("higher", 1.0, 1.1, True),
        ("higher", 1.0, 0.9, False),
        ("higher", None, 0.9, None),
    ],
)
def test_met(better: str, target: float | None, value: float, met: bool | None) -> None:
    assert row(measurement(better, target), Measured(value=value))["met"] is met


def test_a_target_that_depends_on_the_machine() -> None:
    found = row(measurement("higher"), Measured(value=2.0, floor=6.0, target=2.5))
    assert (found["target"], found["met"], found["floor"]) == (2.5, False, 6.0)


def test_every_registered_function_exists() -> None:
    assert tuple(GROUPS) == NAMES
    for group in GROUPS.values():
        for item in group:
            module, _, name = item.function.partition(":")
            assert callable(getattr(importlib.import_module(module), name))
    names = {item.name for group in GROUPS.values() for item in group}
    assert names >= {
        "help_start",
        "fingerprint_rate",
        "aggregate_rate",
        "aggregate_peak",
        "blob_up",
        "blob_down",
        "round_overhead_10mb",
        "round_overhead_128mb",
        "replay_equal",
    }


def test_a_round_lasts_until_the_next_one_opens() -> None:
    """What comes after the closing is published is in it: fetching the change, applying it, Ready."""
    ledger = [
        {"opened_ms": 1_000, "published_ms": 1_200},
        {"opened_ms": 1_500, "published_ms": 1_600},
        {"opened_ms": 2_100, "published_ms": 2_200},
    ]
    assert opening_intervals(ledger) == [500, 600]


def test_a_measurement_that_fails_says_why() -> None:
    broken = Measurement(name="broken", function="json:loads", unit="s", better="lower", what="")
    with pytest.raises(WorkerError, match=r"broken failed[\s\S]*TypeError"):
        run_one(broken)


def test_a_measurement_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = next(item for item in GROUPS["core"] if item.name == "help_start")
    broken = Measurement(name="broken", function="json:loads", unit="s", better="lower", what="")
    monkeypatch.setitem(GROUPS, "core", (broken, whole))
    done = CliRunner().invoke(bench, ["core", "--format", "json"])
    assert [row["name"] for row in json.loads(done.stdout)] == ["help_start"]
    assert isinstance(done.exception, WorkerError)
    assert "1 of 2 measurements failed: broken" in str(done.exception)


def test_bench_from_the_command_line(manyhands: Run) -> None:
    done = manyhands("bench", "core", "--only", "help_start", "--format", "json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert set(found) == {"name", "value", "unit", "target", "floor", "met", "note"}
    assert 0 < found["floor"] < found["value"] < 5
    assert found["met"] == (found["value"] <= 0.3)


def test_an_unknown_measurement_is_named(manyhands: Run) -> None:
    done = manyhands("bench", "core", "--only", "nothing")
    assert done.returncode == 2
    assert "fingerprint_rate" in done.stderr
