"""Live views: as plain lines and as a redrawn table."""

from __future__ import annotations

import io
import json
import time
from typing import Any

import pytest
from rich.console import Console

from manyhands.node.view import RunView
from manyhands.ui.live import ClientScreen, RunScreen, Screen, choose_logs, run_table

KEY, OTHER = "a1" * 32, "b2" * 32


def run_view(closed: int, **changes: Any) -> RunView:
    rounds = [
        {
            "round": n,
            "closed_ms": 1000 * n,
            "duration_ms": 2000,
            "mean_loss": 5.0 - n,
            "counted": [{"client": KEY, "loss": 5.0 - n}],
            "uncounted": [{"client": OTHER, "reason": "late \x1b[2J"}] if n == 1 else [],
        }
        for n in range(closed)
    ]
    run = {
        "run_id": "r-1",
        "name": "demo",
        "phase": "training",
        "closed_rounds": closed,
        "total_rounds": 8,
        "topology": "star",
        "preset": "diloco",
        "clients": [
            {
                "key": KEY,
                "label": "one",
                "status": "ready",
                "tokens_per_s": 1234.5,
                "bytes_up": 4096,
                "counted": closed,
            },
            {"key": OTHER, "label": "\x1b[31mred", "status": "ready", "suspected": True},
        ],
        "rounds": rounds,
        "incidents": [{"ms": 0, "client": OTHER, "what": "joined", "round": 0}],
        "evaluations": [{"round": 0, "loss": 6.9}] + ([{"round": 2, "loss": 4.5}] if closed > 1 else []),
        "started_ms": 0,
        "now_ms": 61_000,
    }
    return RunView.parse({**run, **changes})


def drawn(what: Any) -> str:
    console = Console(width=120, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_table_of_a_run() -> None:
    text = drawn(run_table(run_view(3)))
    assert "round 3/8" in text
    assert "1:01 so far" in text
    assert "about 10 s left" in text
    assert "1,234" in text
    assert "4.0 KiB" in text
    assert "suspected" in text
    assert "(from 6.9000)" in text
    assert "\x1b[31mred" not in text
    assert "\\x1b[31mred" in text


def test_table_of_a_paused_run_says_why() -> None:
    text = drawn(run_table(run_view(3, phase="paused", reason="three rounds failed")))
    assert "three rounds failed" in text
    assert "left" not in text.split("\n")[1]


def test_lines_say_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    with RunScreen("console") as screen:
        for view in (run_view(0), run_view(1), run_view(1), run_view(3), run_view(3, phase="finished")):
            screen.show(view)
    lines = [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "\\x1b[31mred joined",
        "validation loss 6.9000 at round 0",
        "the run is training",
        "round 0: loss 5.0000, 1 merged, 2.0 s",
        "round 1: loss 4.0000, 1 merged, \\x1b[31mred not merged: late \\x1b[2J, 2.0 s",
        "round 2: loss 3.0000, 1 merged, 2.0 s",
        "validation loss 4.5000 at round 2",
        "the run is finished",
    ]


def test_none_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with RunScreen("none") as screen, ClientScreen("none", KEY) as client:
        screen.show(run_view(3))
        screen.line("server starting")
        client.show({"kind": "sent", "text": "sent"})
    assert capsys.readouterr().out == ""


def test_client_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ClientScreen("console", KEY) as screen:
        screen.show({"kind": "progress", "steps_done": 3, "steps": 10})
        screen.show({"kind": "sent", "text": "round 2: update sent", "ms": 0})
        screen.show({"kind": "refused", "text": "too late\n", "level": "warning"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines] == ["round 2: update sent", "warning: too late\\x0a"]


def test_client_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    with ClientScreen("json", KEY) as screen:
        screen.show({"kind": "sent", "loss": float("nan"), "text": "é"})
    assert json.loads(capsys.readouterr().out) == {"kind": "sent", "loss": None, "text": "é"}


def test_client_panel_keeps_the_latest(capsys: pytest.CaptureFixture[str]) -> None:
    with ClientScreen("console", KEY) as screen:
        screen.show({"kind": "joined", "run_id": "r-1", "total_rounds": 8, "state": "catching up"})
        screen.show(
            {"kind": "progress", "round": 4, "steps_done": 3, "steps": 10, "loss": 2.5, "state": "working"}
        )
        screen.show({"kind": "progress", "loss": None, "bytes_up": 2048})
        text = drawn(screen._panel())
    capsys.readouterr()
    assert "4 of 8" in text
    assert "3/10" in text
    assert "2.5000" in text
    assert "2.0 KiB" in text


def test_no_redrawing_where_nobody_could_see_it() -> None:
    assert choose_logs(None) == "console"  # pytest's standard output is no terminal
    assert choose_logs("tui") == "console"
    assert choose_logs("tui-and-console") == "console"
    assert choose_logs("json") == "json"


class Faulty(Screen):
    """One that cannot be drawn at first."""

    def __init__(self) -> None:
        super().__init__(redrawn=True, refresh_per_s=100)
        self.faulty = True

    def _panel(self) -> str:
        return str([][0]) if self.faulty else "all is well"

    def news(self) -> None:
        self._draw()


def test_a_fault_in_the_view_is_shown_and_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with Faulty() as screen:
        screen.console.file = output = io.StringIO()
        until = time.monotonic() + 10
        while "cannot be drawn: IndexError" not in output.getvalue():
            screen.news()
            assert time.monotonic() < until
        screen.faulty = False
        with screen.asking():
            drawn = output.getvalue()
            screen.line("held")
            assert output.getvalue() == drawn
        assert "held" in output.getvalue()
        while "all is well" not in output.getvalue():
            screen.news()
            assert time.monotonic() < until
