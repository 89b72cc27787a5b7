"""Live views in a terminal: a run's table, a client's own line of work; a training's is in ui/live_training.py.

Each is fed with structured events or views and shows the latest; on a terminal as something that is redrawn in
place (rich), elsewhere as plain lines, one for each thing that happened. Nobody parses what is printed here.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from manyhands.node.view import RunView
from manyhands.ui.logs import clock, json_line
from manyhands.ui.run_view import CLIENT_COLUMNS, client_rows
from manyhands.ui.terminal import human_bytes, human_loss, human_rate, human_seconds, printable, short_key

_COLORS = {
    "ready": "green",
    "catching up": "cyan",
    "suspected": "yellow",
    "lost": "red",
    "kicked": "red",
    "left": "dim",
    "training": "cyan",
    "finished": "green",
    "paused": "yellow",
    "failed": "red",
}
_RIGHT = frozenset({"round", "counted", "uncounted", "loss", "rate", "up", "down"})
_SHOWN_INCIDENTS = 4


def choose_logs(asked: str | None) -> str:
    """What is shown: as asked, else the redrawn view on a terminal and plain lines elsewhere.

    A redrawn view that nobody could see falls back to plain lines.
    """
    terminal = sys.stdout.isatty()
    if asked is None:
        return "tui" if terminal else "console"
    return "console" if asked.startswith("tui") and not terminal else asked


class Screen:
    """What is redrawn in place, or nothing; `_panel` is what a subclass shows.

    It is made and drawn only after news (`_draw`), by a thread, and at most `refresh_per_s` times a second: a view
    that somebody follows for days must cost little. What `_panel` goes through changes under `_lock`.
    """

    def __init__(self, redrawn: bool, *, refresh_per_s: float = 6) -> None:
        self.console = Console()
        self._redrawn = redrawn
        self._live: Live | None = None
        self._least_s = 1 / refresh_per_s
        self._lock = threading.RLock()
        self._news, self._closed = threading.Event(), threading.Event()
        self._drawing: threading.Thread | None = None
        self._held: list[str] | None = None

    def __enter__(self) -> Self:
        self._go_on()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop redrawing; what was drawn last stays."""
        if self._live is None or self._drawing is None:
            return
        self._closed.set()
        self._news.set()
        self._drawing.join()
        self._drawing = None
        self._live.stop()

    def _go_on(self) -> None:
        if not self._redrawn:
            return
        self._live = Live(console=self.console, auto_refresh=False, get_renderable=self._locked_panel)
        self._closed.clear()
        self._live.start(refresh=True)
        self._drawing = threading.Thread(target=self._redraw, name="screen", daemon=True)
        self._drawing.start()

    def _redraw(self) -> None:
        assert self._live is not None
        while not self._closed.wait(self._least_s):
            self._news.wait()
            self._news.clear()
            self._live.refresh()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Nothing is drawn and no line is written while a person is asked; the lines come after."""
        self.close()
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            self._go_on()
            for text in held:
                self._write(text)

    def _locked_panel(self) -> RenderableType:
        try:
            with self._lock:
                return self._panel()
        except (
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:  # an event that is not as expected
            return Text(f"this cannot be drawn: {type(error).__name__}: {error}", style="dim")

    def _panel(self) -> RenderableType:
        return ""

    def _draw(self) -> None:
        self._news.set()

    def line(self, text: str, time_ms: int | None = None) -> None:
        """A line that stays: above the redrawn view, or on standard output. time_ms: of what it says, if not now."""
        text = f"{clock(time_ms)}  {text}"
        if self._held is None:
            self._write(text)
        else:
            self._held.append(text)

    def _write(self, text: str) -> None:
        if self._live is not None:
            self.console.print(Text(text))
        else:
            click.echo(text)
            sys.stdout.flush()


# ---------------------------------------------------------------------------------------- a run
class RunScreen(Screen):
    """A run's live table, fed with views of it."""

    def __init__(self, logs: str) -> None:
        super().__init__(redrawn=logs.startswith("tui"))
        self._lines = logs in ("console", "tui-and-console")
        self._silent = logs == "none"
        self._rounds = -1
        self._incidents = 0
        self._evaluations = 0
        self._phase = ""
        self._view: RunView | None = None

    def line(self, text: str, time_ms: int | None = None) -> None:
        if not self._silent:
            super().line(text, time_ms)

    def show(self, view: RunView) -> None:
        if self._lines:
            for text in self._happened(view):
                self.line(text)
        self._view = view
        self._draw()

    def _panel(self) -> RenderableType:
        return "" if self._view is None else run_table(self._view)

    def _happened(self, view: RunView) -> list[str]:
        """What has happened since the last view, a line each."""
        names = _names(view)
        news = []
        for incident in view.incidents[self._incidents :]:
            news.append(
                f"{names.get(incident.client, short_key(incident.client))} {printable(incident.text)}"
            )
        for closed in (r for r in view.rounds if r.round > self._rounds):
            not_counted = "".join(
                f", {names.get(u.client, short_key(u.client))} not merged: {printable(u.reason)}"
                for u in closed.uncounted
            )
            news.append(
                f"round {closed.round}: loss {human_loss(closed.mean_loss)}, {len(closed.counted)} merged"
                f"{not_counted}, {human_seconds(closed.duration_ms / 1000)}"
            )
        for evaluation in view.evaluations[self._evaluations :]:
            news.append(f"validation loss {human_loss(evaluation.loss)} at round {evaluation.round}")
        if view.phase != self._phase:
            reason = f": {printable(view.reason)}" if view.reason else ""
            news.append(f"the run is {view.phase.replace('_', ' ')}{reason}")
        self._phase = view.phase
        self._incidents, self._evaluations = len(view.incidents), len(view.evaluations)
        self._rounds = max([self._rounds, *(r.round for r in view.rounds)])
        return news


def run_table(view: RunView) -> RenderableType:
    """Progress, clients, and the latest incidents of a run."""
    phase = view.phase.replace("_", " ")
    head = Text.assemble(
        (printable(view.name), "bold"),
        "  ",
        (phase, _COLORS.get(phase, "")),
        f"  {view.run_id}  {view.topology}" + (f"  {view.preset}" if view.preset else ""),
    )
    progress = Table.grid(padding=(0, 2))
    progress.add_row(
        ProgressBar(total=view.total_rounds, completed=view.closed_rounds, width=40),
        f"round {view.closed_rounds}/{view.total_rounds}",
        f"{human_seconds((view.now_ms - view.started_ms) / 1000)} so far",
        _time_left(view),
    )
    parts: list[RenderableType] = [head, progress, _losses(view), _clients(view)]
    names = _names(view)
    for incident in view.incidents[-_SHOWN_INCIDENTS:]:
        who = names.get(incident.client, short_key(incident.client))
        parts.append(Text(f"  {clock(incident.ms)}  {who} {printable(incident.text)}", style="dim"))
    if view.reason and view.phase in ("paused", "failed", "waiting"):
        parts.append(Text(printable(view.reason), style="yellow"))
    return Group(*parts)


def _time_left(view: RunView) -> str:
    """From the latest rounds, while the run is going."""
    latest = [r.duration_ms for r in view.rounds[-6:]]
    left = view.total_rounds - view.closed_rounds
    if not latest or view.phase != "training" or left == 0:
        return ""
    return f"about {human_seconds(sum(latest) / len(latest) / 1000 * left)} left"


def _losses(view: RunView) -> Text:
    training = view.rounds[-1].mean_loss if view.rounds else None
    validation = view.evaluations[-1].loss if view.evaluations else None
    first = view.evaluations[0].loss if view.evaluations else None
    text = Text.assemble("training loss ", (human_loss(training), "bold"), "   validation loss ")
    text.append(human_loss(validation), "bold")
    if first is not None and validation is not None and len(view.evaluations) > 1:
        text.append(f" (from {human_loss(first)})", "dim")
    return text


def _clients(view: RunView) -> Table:
    clients = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for key, heading in CLIENT_COLUMNS.items():
        clients.add_column(heading, justify="right" if key in _RIGHT else "left", no_wrap=True)
    for row in client_rows(view):
        cells = [
            Text(
                "-" if row[key] is None else str(row[key]),
                style=_COLORS.get(str(row[key]), "") if key == "state" else "",
            )
            for key in CLIENT_COLUMNS
        ]
        clients.add_row(*cells)
    return clients


def _names(view: RunView) -> dict[str, str]:
    return {c.key: printable(c.label, width=24) or short_key(c.key) for c in view.clients}


# ------------------------------------------------------------------------------------- a client
class ClientScreen(Screen):
    """What one client does, fed with its events (node/view.py ClientEvent)."""

    def __init__(self, logs: str, public: str) -> None:
        super().__init__(redrawn=logs.startswith("tui"))
        self._logs = logs
        self._now: dict[str, Any] = {"client": public, "state": "connecting"}
        self._latest: list[str] = []
        self._started = time.monotonic()

    def show(self, event: Mapping[str, Any]) -> None:
        if self._logs == "none":
            return
        if self._logs == "json":
            click.echo(json_line(event))
            sys.stdout.flush()
            return
        self._now.update({key: value for key, value in event.items() if value is not None})
        text = printable(str(event.get("text") or ""))
        if text:
            self._latest = [*self._latest[-5:], f"{clock(event.get('ms'))}  {text}"]
            if self._logs in ("console", "tui-and-console"):
                level = str(event.get("level", "info"))
                self.line(text if level == "info" else f"{level}: {text}")
        self._draw()

    def _panel(self) -> RenderableType:
        now = self._now
        head = Text.assemble(
            (short_key(str(now["client"])), "bold"),
            f"  run {now.get('run_id', '-')}  ",
            (str(now.get("state", "")), "cyan"),
        )
        grid = Table.grid(padding=(0, 2))
        steps, done = int(now.get("steps") or 0), int(now.get("steps_done") or 0)
        total = f" of {now['total_rounds']}" if "total_rounds" in now else ""
        grid.add_row("round", f"{now.get('round', '-')}{total}")
        grid.add_row("steps", ProgressBar(total=max(1, steps), completed=done, width=30), f"{done}/{steps}")
        grid.add_row("loss", human_loss(now.get("loss")))
        grid.add_row(f"{now.get('unit', 'tokens')}/s", human_rate(now.get("tokens_per_s")))
        grid.add_row("up", human_bytes(float(now.get("bytes_up", 0))))
        grid.add_row("down", human_bytes(float(now.get("bytes_down", 0))))
        grid.add_row("here for", human_seconds(time.monotonic() - self._started))
        return Group(head, grid, *(Text("  " + line, style="dim") for line in self._latest))
