"""The live view of `manyhands train`, fed with the events of engine/run.py: redrawn in place, or a line for each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from manyhands.ui.live import Screen
from manyhands.ui.logs import json_line
from manyhands.ui.terminal import human_bytes, human_loss, human_rate, human_seconds, printable
from manyhands.ui.training_table import TrainingTable, table_of

_COLORS: Final = {"finished": "green", "interrupted": "yellow"}
_IN_THE_PANEL: Final = frozenset({"preparing", "started", "step", "evaluation", "saved", "finished"})


class TrainScreen(Screen):
    """`manyhands train`, fed with the events of engine/run.py: redrawn, or a line for each."""

    def __init__(
        self, logs: str, name: str, *, samples_per_step: int | None = None, refresh_per_s: float = 6
    ) -> None:
        super().__init__(redrawn=logs == "tui", refresh_per_s=refresh_per_s)
        self._logs, self._name = logs, name
        self._table = None if samples_per_step is None else TrainingTable(samples_per_step)
        self._activity = "starting"
        self._started: Mapping[str, Any] = {}
        self._step: Mapping[str, Any] = {}
        self._evaluations: dict[str, list[Mapping[str, Any]]] = {}  # by set, the first and the latest
        self._checkpoint: Mapping[str, Any] = {}

    def show(self, event: Mapping[str, Any]) -> None:
        if self._logs == "none":
            return
        if self._logs == "json":
            click.echo(json_line(event))
            sys.stdout.flush()
            return
        with self._lock:
            self._take(event)
        text = train_line(event)
        if text and (self._logs == "console" or event["kind"] not in _IN_THE_PANEL):
            self.line(text, event.get("time_ms"))
        self._draw()

    def _take(self, event: Mapping[str, Any]) -> None:
        if self._table is not None:
            self._table.take(event)
        match event["kind"]:
            case "loading":
                self._activity = str(event["text"])
            case "preparing":
                self._activity = train_line(event)
            case "started":
                self._started, self._activity = event, "training"
            case "step":
                self._step = event
            case "evaluation":
                of_set = self._evaluations.setdefault(event["set"], [])
                of_set[1:] = [event]
            case "saved":
                self._checkpoint = event
            case "finished" | "interrupted" as kind:
                self._activity = kind

    def _panel(self) -> RenderableType:
        head = Text.assemble(
            (printable(self._name), "bold"), "  ", (self._activity, _COLORS.get(self._activity, "cyan"))
        )
        parts: list[RenderableType] = [head]
        if self._started:
            head.append(f"  {_machines(self._started)}", "dim")
            parts.append(self._progress())
            parts.append(_figures(self._step))
        if self._table is not None and self._table.rows:
            parts.append(table_of([self._table]))
        if self._evaluations:
            parts.append(_evaluations(self._evaluations))
        if self._checkpoint:
            parts.append(Text(f"checkpoint of step {self._checkpoint['step']}", style="dim"))
        return Group(*parts)

    def _progress(self) -> Table:
        steps, done = self._started["steps"], self._step.get("step", self._started["step"])
        grid = Table.grid(padding=(0, 2))
        left = self._step.get("left_s") if self._activity == "training" else None
        grid.add_row(
            ProgressBar(total=max(1, steps), completed=done, width=30),
            f"step {done}/{steps}",
            "" if left is None else f"about {human_seconds(left)} left",
        )
        return grid


def in_the_end(loss_before: float, loss_after: float, steps: int, per_s: float, unit: str) -> str:
    """What a training has come to."""
    return f"validation loss {loss_before:.4f} -> {loss_after:.4f} in {steps} steps, {per_s:,.0f} {unit}/s"


def train_line(event: Mapping[str, Any]) -> str:
    """A training's event as a line; empty where nobody wants to read one."""
    match event["kind"]:
        case "loading" | "optimizer_stats":
            return ""
        case "preparing":
            return f"preparing the data of task {event['task']}"
        case "started":
            return (
                f"{event['steps']} steps, {event['samples']:,} samples, {event['parameters']:,} parameters "
                f"on {_machines(event)}"
            )
        case "step":
            figures = ", ".join(f"{name} {value}" for name, value in _figures_of(event).items())
            return f"step {event['step']}/{event['steps']}: {figures}, {human_seconds(event['left_s'])} left"
        case "evaluation":
            metrics = "".join(f", {part}" for part in _metrics(event))
            return f"{event['set']} loss {human_loss(event['loss'])}{metrics} at step {event['step']}"
        case "resumed":
            return f"resumed at step {event['step']} from {event['checkpoint']}"
        case "set_aside":
            count = len(event["checkpoints"])
            return (
                f"moved {count} checkpoint{'s' * (count > 1)} after step {event['step']} to "
                f"{Path(event['checkpoints'][0]).parent}: this training takes another course from there"
            )
        case "saved":
            return f"saved {event['checkpoint']}"
        case "warning":
            return f"warning: {printable(event['text'])}"
        case kind:
            return f"{kind} at step {event['step']}" if "step" in event else str(kind)


def _machines(started: Mapping[str, Any]) -> str:
    """'cpu, 2 processes, 1 thread each'."""
    processes, threads = started["processes"], started["threads"]
    parts = [str(started["device"]).partition(":")[0] if processes > 1 else str(started["device"])]
    if processes > 1:
        parts.append(f"{processes} processes")
    if parts[0] == "cpu":
        parts.append(f"{threads} thread{'s' * (threads > 1)}" + (" each" if processes > 1 else ""))
    return ", ".join(parts)


def _figures_of(step: Mapping[str, Any]) -> dict[str, str]:
    """What a report says, each in its own unit; figures that are not known here are left out."""
    figures = {
        "loss": human_loss(step["loss"]),
        "learning rate": f"{step['learning_rate']:.3g}",
        "gradient norm": None if step["gradient_norm"] is None else f"{step['gradient_norm']:.3g}",
        f"{step['unit']}/s": human_rate(step["tokens_per_s"]),
        "MFU": None if step["mfu"] is None else f"{step['mfu']:.1%}",
        "memory": human_bytes(step["memory_bytes"]),
        "skipped": str(step["skipped"]) if step["skipped"] else None,
    }
    return {name: value for name, value in figures.items() if value is not None}


def _figures(step: Mapping[str, Any]) -> RenderableType:
    """In as many columns as the terminal's width takes."""
    if not step:
        return Text("no step is done yet", style="dim")
    return Columns(
        [
            Text.assemble((f"{name} ", "dim"), (value, "bold" if name == "loss" else ""), no_wrap=True)
            for name, value in _figures_of(step).items()
        ],
        padding=(0, 3, 0, 0),
    )


def _metrics(evaluation: Mapping[str, Any]) -> list[str]:
    """Each metric of an evaluation with its value."""
    return [f"{name.replace('_', ' ')} {value:.4g}" for name, value in evaluation["metrics"].items()]


def _evaluations(by_set: Mapping[str, list[Mapping[str, Any]]]) -> Table:
    """The latest evaluation of each set, and where its loss came from."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("evaluation", no_wrap=True)
    table.add_column("step", justify="right", no_wrap=True)
    table.add_column("loss", no_wrap=True)
    table.add_column("")
    for name, of_set in by_set.items():
        latest = of_set[-1]
        loss = Text(human_loss(latest["loss"]), style="bold")
        if len(of_set) > 1:
            loss.append(f" (from {human_loss(of_set[0]['loss'])})", "not bold dim")
        table.add_row(printable(name), str(latest["step"]), loss, ", ".join(_metrics(latest)))
    return table
