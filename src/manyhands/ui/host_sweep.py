"""Several trainings on several hosts at once, in one table: each host takes the next one when it is free."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Group, RenderableType
from rich.text import Text

from manyhands.errors import (
    Interrupted,
    ManyhandsError,
    Refused,
    ServerUnreachable,
    StorageError,
    WorkerError,
)
from manyhands.hosts.beginning import Wish, begin
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.record import Record, recorded
from manyhands.hosts.watching import watch
from manyhands.ui.attending import attended, detached, stop_all
from manyhands.ui.host_training import REFRESH_PER_S, ended
from manyhands.ui.live import Screen
from manyhands.ui.live_training import train_line
from manyhands.ui.logs import json_line
from manyhands.ui.terminal import printable
from manyhands.ui.training_table import ROWS, TrainingTable, table_of

_OF_THE_HOST: Final = (ServerUnreachable, Refused, StorageError, WorkerError)
"""What `begin` raises because of a host, where another may do; anything else is the training's own fault."""


_ENDED: Final = frozenset({"finished", "interrupted"})


class SweepScreen(Screen):
    """One table of all trainings; a line for each event elsewhere."""

    def __init__(self, logs: str) -> None:
        super().__init__(redrawn=logs == "tui", refresh_per_s=REFRESH_PER_S)
        self.logs = logs
        self.tables: list[TrainingTable] = []

    def add(self, name: str, samples_per_step: int) -> TrainingTable:
        table = TrainingTable(samples_per_step, name)
        with self._lock:
            self.tables.append(table)
        return table

    def remove(self, table: TrainingTable) -> None:
        with self._lock:
            self.tables.remove(table)
        self._draw()

    def take(self, table: TrainingTable, event: Mapping[str, Any]) -> None:
        with self._lock:
            table.take(event)
        self._draw()

    def _panel(self) -> RenderableType:
        states = ", ".join(f"{printable(t.name)} {t.state}" for t in self.tables)
        shown = self.tables
        # what does not fit is cut below: let that be what has ended
        if len(shown) > self.console.height // 2:
            shown = sorted(shown, key=lambda table: table.state in _ENDED)
        return Group(Text(states, style="dim"), table_of(shown, rows=max(ROWS, len(shown))))


class OneOfMany:
    """The view of one training in the common table (hosts/watching.py: View)."""

    def __init__(self, screen: SweepScreen, table: TrainingTable) -> None:
        self._screen, self._table = screen, table

    @property
    def name(self) -> str:
        return self._table.name

    def event(self, event: Mapping[str, Any]) -> None:
        self._screen.take(self._table, event)
        if self._screen.logs == "json":
            click.echo(json_line({"run": self._table.name, **event}))
            sys.stdout.flush()
        elif self._screen.logs == "console" and (text := train_line(event)):
            self._screen.line(f"{self._table.name}: {text}", event.get("time_ms"))

    def line(self, host: str, text: str) -> None:
        self.tell(f"{host}: {text}")

    def tell(self, text: str) -> None:
        if self._screen.logs == "json":
            click.echo(json_line({"run": self._table.name, "kind": "host", "text": text}))
        elif self._screen.logs != "none":
            self._screen.line(printable(f"{self._table.name}: {text}"))


def sweep_on_hosts(groups: Sequence[Sequence[Host]], wishes: Sequence[tuple[str, Wish]], logs: str) -> int:
    """Carry out every wish; the exit code of the first that failed, in the order of the wishes.

    A training that fails does not keep the others from being tried. A host on which one cannot begin gets no more,
    and another carries it out; what is left when there is no host any more has failed as the last one did.
    Who detaches from those that run is told which have not begun, and are not. Raises Interrupted after a signal.
    """
    return asyncio.run(_Sweep(groups, wishes, logs).carry_out())


class _Sweep:
    def __init__(
        self, groups: Sequence[Sequence[Host]], wishes: Sequence[tuple[str, Wish]], logs: str
    ) -> None:
        self._groups, self._logs = groups, logs
        self._left = list(enumerate(wishes))
        self._codes: dict[int, int] = {}
        self._running: dict[int, Record] = {}
        self._unsure: list[str] = []  # were being begun when a person left
        self._stopped = False
        self._beginning = 0
        self._turn = asyncio.Condition()
        self._fault: ManyhandsError | None = None

    async def carry_out(self) -> int:
        with SweepScreen(self._logs) as screen:
            workers = asyncio.create_task(self._all(screen))
            left = await attended(workers, screen, lambda: self._stop(screen))
        if left is not None:
            return detached(list(self._running.values()), left, self._not_begun())
        workers.result()
        return next((code for _, code in sorted(self._codes.items()) if code), 0)

    async def _stop(self, screen: SweepScreen) -> None:
        """Begin no more, and have those that run save and end; what is just being begun ends when it has."""
        self._stopped = True
        if waiting := self._not_begun():
            screen.line(waiting)
        self._codes |= {number: Interrupted.exit_code for number, _ in self._left}
        self._left.clear()
        await stop_all(list(self._running.values()), screen.line)

    def _not_begun(self) -> str:
        names = [name or wish.run for _, (name, wish) in self._left]
        lines = [f"not begun: {'; '.join(names)}"] if names else []
        lines += [f"{name} was just being begun: `manyhands hosts ls` tells" for name in self._unsure]
        return "\n".join(lines)

    async def _all(self, screen: SweepScreen) -> None:
        await asyncio.gather(*(self._work(group, screen) for group in self._groups))
        if self._left and self._fault is not None:
            click.echo(f"error: no host is left for {len(self._left)} of the trainings", err=True)
            self._codes |= {number: self._fault.exit_code for number, _ in self._left}

    async def _next(self) -> tuple[int, tuple[str, Wish]] | None:
        """The next to begin; None where nothing is left, and nothing that begins elsewhere can come back."""
        async with self._turn:
            await self._turn.wait_for(lambda: self._left or not self._beginning)
            if not self._left:
                return None
            self._beginning += 1
            return self._left.pop(0)

    async def _has_begun(self) -> None:
        """Or has failed to."""
        async with self._turn:
            self._beginning -= 1
            self._turn.notify_all()

    async def _work(self, group: Sequence[Host], screen: SweepScreen) -> None:
        """One host, or those of one training, until nothing is left, or one of them cannot be trained on."""
        while (taken := await self._next()) is not None:
            number, (name, wish) = taken
            shown = " ".join(part for part in (group[0].host_name, name) if part)
            table = screen.add(shown, wish.configuration.plan.local.batch_size)
            view = OneOfMany(screen, table)
            try:
                record = await begin(group, wish, view)
            except asyncio.CancelledError:  # a person leaves just now
                self._unsure.append(shown)
                raise
            except _OF_THE_HOST as error:
                view.tell(f"error: {error}; nothing more is begun there")
                screen.remove(table)
                if self._stopped:
                    self._codes[number] = Interrupted.exit_code
                else:
                    self._left.insert(0, taken)
                self._fault = error
                return
            except ManyhandsError as error:
                view.tell(f"error: {error}")
                self._codes[number] = error.exit_code
            else:
                self._running[number] = record
                if self._stopped:
                    await stop_all([record], screen.line)
            finally:
                await self._has_begun()
            if number in self._running:
                self._codes[number] = await _watched(
                    wish.directory, self._running[number], view, replay=False
                )
                del self._running[number]  # not of one that is left: it goes on


def attach_all(runs: Sequence[tuple[Path, Record]], logs: str) -> int:
    """Watch several trainings that were started before; the exit code of the first that failed."""

    async def carry_out() -> int:
        with SweepScreen(logs) as screen:
            views = [OneOfMany(screen, screen.add(record.run, record.samples_per_step)) for _, record in runs]
            watching = asyncio.gather(
                *(_watched(*run, view, replay=True) for run, view in zip(runs, views, strict=True))
            )
            records = [record for _, record in runs]
            left = await attended(watching, screen, lambda: stop_all(records, screen.line))
        if left is not None:
            now = [recorded(directory) or record for directory, record in runs]
            return detached([record for record in now if not record.ended], left)
        return next((code for code in watching.result() if code), 0)

    return asyncio.run(carry_out())


async def _watched(directory: Path, record: Record, view: OneOfMany, *, replay: bool) -> int:
    """One training to its end; its exit code."""
    try:
        outcome = await watch(directory, record, view, replay=replay)
    except ManyhandsError as error:
        view.tell(f"error: {error}")
        return error.exit_code
    for host, ending in outcome.endings.items():
        if ending.get("exit_code") != 0:
            click.echo(ended(host, ending, view.name), err=True)
    return outcome.exit_code
