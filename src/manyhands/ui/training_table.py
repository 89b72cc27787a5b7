"""The table of a training: a row each minute, after the first hour each ten; the last one changes in place.

Fed with the events of engine/run.py, from this machine or from a host, by the clock of who wrote them. Several
trainings share one table. Pure: what is drawn is what was taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from manyhands.ui.terminal import human_loss, human_rate, printable

ROWS: Final = 12
_MINUTE_MS: Final = 60_000
_HOUR_MS: Final = 60 * _MINUTE_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A moment. `change`: of the loss, since the row before."""

    time_ms: int
    elapsed_ms: int
    samples: int
    samples_per_s: float | None
    change: float | None
    loss: float | None
    learning_rate: float | None
    losses: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class TrainingTable:
    """The rows of one training; `take` every event."""

    samples_per_step: int
    name: str = ""
    rows: list[Row] = field(default_factory=list)
    state: str = "starting"
    _began_ms: int | None = None
    _last: tuple[int, int] | None = None  # time and step of the report before
    _since: tuple[int, int] = (0, 0)  # from which the last row's samples per second are
    _metrics: dict[str, float] = field(default_factory=dict)
    _set: str | None = None

    def take(self, event: Mapping[str, Any]) -> None:
        match event["kind"]:
            case "started":
                self._began_ms = self._began_ms or event["time_ms"]
                self._last = self._since = (event["time_ms"], event["step"])
                self.state = "training"
            case "evaluation" if self._set in (None, event["set"]):
                self._set = event["set"]
                self._metrics = {"validation loss": event["loss"], **event["metrics"]}
                if self.rows:  # it is of the steps up to there
                    self.rows = [*self.rows[:-1], replace(self.rows[-1], metrics=dict(self._metrics))]
            case "step":
                self._step(event)
            case "finished" | "interrupted" as kind:
                self.state = kind

    def _step(self, event: Mapping[str, Any]) -> None:
        now, step = event["time_ms"], event["step"]
        began = self._began_ms = self._began_ms if self._began_ms is not None else now
        in_place = bool(self.rows) and _period(self.rows[-1].elapsed_ms) == _period(now - began)
        if not in_place:
            self._since = self._last or (now, step)
        self._last = (now, step)
        since_ms, since = self._since
        rate = (step - since) * self.samples_per_step / ((now - since_ms) / 1000) if now > since_ms else None
        rows = self.rows[:-1] if in_place else self.rows
        change = (
            event["loss"] - rows[-1].loss
            if rows and rows[-1].loss is not None and event["loss"] is not None
            else None
        )
        row = Row(
            time_ms=now,
            elapsed_ms=now - began,
            samples=step * self.samples_per_step,
            samples_per_s=rate,
            change=change,
            loss=event["loss"],
            learning_rate=event["learning_rate"],
            losses=event.get("losses") or {},
            metrics=dict(self._metrics),
        )
        self.rows = [*rows, row]


def _period(elapsed_ms: int) -> int:
    """Rows of the same period are one: minutes, and after the first hour tens of minutes."""
    if elapsed_ms < _HOUR_MS:
        return elapsed_ms // _MINUTE_MS
    return 60 + (elapsed_ms - _HOUR_MS) // (10 * _MINUTE_MS)


def table_of(trainings: Sequence[TrainingTable], *, rows: int = ROWS) -> Table:
    """The last rows of each, at most `rows` in all, but always one of each that has any."""
    each = max(1, rows // max(1, len(trainings)))
    shown = [(training, row) for training in trainings for row in training.rows[-each:]]
    losses = list(dict.fromkeys(name for _, row in shown for name in row.losses))
    metrics = list(dict.fromkeys(name for _, row in shown for name in row.metrics))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    if len(trainings) > 1:
        table.add_column("run", no_wrap=True)
    headings = ["time", "seconds", "samples", "samples/s", "change", "loss", *losses, *metrics, "LR"]
    for heading in headings:
        table.add_column(heading.replace("_", " "), justify="right", no_wrap=heading in headings[:6])
    for training, row in shown:
        last = row is training.rows[-1]
        cells = [printable(training.name)] if len(trainings) > 1 else []
        cells += _cells(row, losses, metrics)
        table.add_row(*(Text(cell, style="bold" if last else "") for cell in cells))
    return table


def _cells(row: Row, losses: Sequence[str], metrics: Sequence[str]) -> list[str]:
    return [
        time.strftime("%H:%M:%S", time.localtime(row.time_ms / 1000)),
        f"{row.elapsed_ms / 1000:,.0f}",
        f"{row.samples:,}",
        human_rate(row.samples_per_s),
        "" if row.change is None or not math.isfinite(row.change) else f"{row.change:+.4f}",
        human_loss(row.loss),
        *(human_loss(row.losses.get(name)) for name in losses),
        *("-" if row.metrics.get(name) is None else f"{row.metrics[name]:.4g}" for name in metrics),
        "-" if row.learning_rate is None else f"{row.learning_rate:.3g}",
    ]
