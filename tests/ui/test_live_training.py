"""The live view of a training: what it says of each event, and what its panel shows at both usual widths."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from manyhands.ui.live_training import TrainScreen

STEP = {
    "kind": "step",
    "step": 10,
    "steps": 20,
    "loss": 5.5,
    "learning_rate": 0.0003,
    "gradient_norm": 1.2345,
    "tokens_per_s": 1234.5,
    "unit": "tokens",
    "mfu": None,
    "memory_bytes": 3 << 20,
    "left_s": 75.0,
    "skipped": 0,
}
STARTED = {
    "kind": "started",
    "step": 0,
    "steps": 20,
    "samples": 5000,
    "parameters": 12345,
    "device": "cpu",
    "processes": 2,
    "threads": 1,
}


def evaluation(split: str, step: int, loss: float, **metrics: float) -> dict[str, Any]:
    return {"kind": "evaluation", "set": split, "step": step, "loss": loss, "metrics": metrics}


EVENTS = [
    {"kind": "loading", "text": "loading torch"},
    {"kind": "preparing", "task": "grids"},
    evaluation("validation", 0, 6.9, pixel_accuracy=0.25),
    STARTED,
    STEP,
    {"kind": "optimizer_stats", "step": 10, "tensors": {}},
    evaluation("validation", 10, 4.5, pixel_accuracy=0.5),
    evaluation("mirrors", 10, 3.5),
    {"kind": "saved", "step": 10, "checkpoint": "/x"},
    {"kind": "warning", "step": 10, "text": "wandb failed\x1b[2J"},
]


def panel(screen: TrainScreen, width: int) -> list[str]:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(screen._panel())
    return [line.rstrip() for line in capture.get().splitlines()]


def test_each_event_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainScreen("console", "mine") as screen:
        for event in [*EVENTS, {"kind": "interrupted", "step": 10}]:
            screen.show(event)
    assert [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "preparing the data of task grids",
        "validation loss 6.9000, pixel accuracy 0.25 at step 0",
        "20 steps, 5,000 samples, 12,345 parameters on cpu, 2 processes, 1 thread each",
        "step 10/20: loss 5.5000, learning rate 0.0003, gradient norm 1.23, tokens/s 1,234, memory 3.0 MiB, "
        "1:15 left",
        "validation loss 4.5000, pixel accuracy 0.5 at step 10",
        "mirrors loss 3.5000 at step 10",
        "saved /x",
        "warning: wandb failed\\x1b[2J",
        "interrupted at step 10",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_panel_shows_everything_in_the_width_that_there_is(
    capsys: pytest.CaptureFixture[str], width: int
) -> None:
    with TrainScreen("console", "mine") as screen:
        for event in EVENTS:
            screen.show(event)
        screen.show({**STEP, "step": 20, "mfu": 0.4123, "skipped": 2, "left_s": 0.0})
        lines = panel(screen, width)
    capsys.readouterr()
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    assert lines[0] == "mine  training  cpu, 2 processes, 1 thread each"
    for part in (
        "step 20/20", "about 0.0 s left", "loss 5.5000", "learning rate 0.0003", "gradient norm 1.23",
        "tokens/s 1,234", "MFU 41.2%", "memory 3.0 MiB", "skipped 2",
        "4.5000 (from 6.9000)  pixel accuracy 0.5", "checkpoint of step 10",
    ):  # fmt: skip
        assert part in text
    assert [line.split()[:3] for line in lines if line.startswith("mirrors")] == [["mirrors", "10", "3.5000"]]


def test_before_the_first_report_the_panel_says_what_is_going_on(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainScreen("console", "mine") as screen:
        screen.show(EVENTS[0])
        assert panel(screen, 80) == ["mine  loading torch"]
        screen.show(EVENTS[1])
        assert panel(screen, 80) == ["mine  preparing the data of task grids"]
        screen.show({**STARTED, "step": 5, "processes": 1})
        lines = panel(screen, 80)
        assert lines[0] == "mine  training  cpu, 1 thread"
        assert "step 5/20" in lines[1]
        assert lines[2] == "no step is done yet"
    capsys.readouterr()
