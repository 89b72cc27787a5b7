"""`manyhands train --host` and `hosts attach`: a training on other machines, seen as if it were here.

In a terminal the first Ctrl-C asks what is meant, a second one detaches; without a terminal every signal detaches:
the training goes on there in any case, and `manyhands hosts attach` shows it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

import click

from manyhands.errors import Interrupted, ManyhandsError
from manyhands.hosts.beginning import Wish, begin
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.record import Record
from manyhands.hosts.watching import Outcome, stop, watch, words_of
from manyhands.ui.live_training import TrainScreen
from manyhands.ui.terminal import human_bytes, human_seconds, printable, printable_lines

REFRESH_PER_S: Final = 1  # every redrawing costs, and a training may take days


class HostScreen:
    """A training's screen, which lines of its hosts and of the connection come to as well."""

    def __init__(self, logs: str, name: str, samples_per_step: int) -> None:
        self._logs = logs
        self._screen = TrainScreen(logs, name, samples_per_step=samples_per_step, refresh_per_s=REFRESH_PER_S)
        self.paused = False
        self._held: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        self._screen.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._screen.close()

    def event(self, event: dict[str, Any]) -> None:
        if self.paused:
            self._held.append(event)
        else:
            self._screen.show(event)

    def line(self, host: str, text: str) -> None:
        self.tell(f"{host}: {text}")

    def tell(self, text: str) -> None:
        if self._logs == "json":
            self.event({"kind": "host", "text": text})
        elif self._logs != "none" and not self.paused:
            self._screen.line(printable(text))

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Nothing is drawn while a person is asked."""
        self.paused = True
        self._screen.close()
        try:
            yield
        finally:
            self._screen.go_on()
            self.paused = False
            held, self._held = self._held, []
            for event in held:
                self._screen.show(event)


# ---------------------------------------------------------------------------------------- train --host
def train_on_hosts(hosts: Sequence[Host], wish: Wish, logs: str) -> int:
    """Start it there and watch it; the exit code. Raises what `begin` and `watch` do; Interrupted when detached."""

    async def carry_out() -> int:
        with HostScreen(
            logs, wish.configuration.plan.name, wish.configuration.plan.local.batch_size
        ) as screen:
            screen.tell(f"looking at {', '.join(host.host_name for host in hosts)}")
            record = await begin(hosts, wish, screen)
            return await _attended(wish.directory, record, screen, logs, replay=False)

    return asyncio.run(carry_out())


def attach(directory: Path, record: Record, logs: str) -> int:
    """Watch a training that was started before, also from another terminal; the exit code."""

    async def carry_out() -> int:
        with HostScreen(logs, record.run, record.samples_per_step) as screen:
            return await _attended(directory, record, screen, logs, replay=True)

    return asyncio.run(carry_out())


async def _attended(directory: Path, record: Record, screen: HostScreen, logs: str, *, replay: bool) -> int:
    """Watch, and listen to the person in front of it."""
    with Signals() as signals:
        watching = asyncio.create_task(watch(directory, record, screen, replay=replay))
        try:
            while not watching.done():
                asked = asyncio.create_task(signals.next())
                await asyncio.wait({watching, asked}, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    asked.cancel()
                    break
                ask = _in_terminal() and asked.result() == signal.SIGINT
                what = await _asked(screen, signals) if ask else "detached"
                if what == "stop":
                    await _stop(record, screen)
                elif what in ("detach", "detached"):
                    return detached([record], chosen=what == "detach")
            outcome = await watching
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    screen.close()
    _tell_end(directory, outcome, quiet=logs in ("json", "none"))
    return outcome.exit_code


def _in_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def detached(records: Sequence[Record], *, chosen: bool) -> int:
    """Say how to see them again. Raises Interrupted where nobody has chosen it."""
    text = "\n".join(
        f"{record.run} goes on at {', '.join(part.host for part in record.parts)}; see it again with: manyhands "
        f"hosts attach {record.run}"
        for record in records
    )
    if chosen:
        click.echo(text)
        return 0
    raise Interrupted(text)


async def _stop(record: Record, screen: HostScreen) -> None:
    for part in record.parts:
        try:
            await stop(part, docker=record.docker, now=False)
            screen.tell(f"{part.host} is asked to save and end")
        except ManyhandsError as error:
            screen.tell(f"{part.host} could not be asked to end: {error}")


async def _asked(screen: HostScreen, signals: Signals) -> str:
    """What a person means by Ctrl-C; a second one detaches."""
    answers = {"d": "detach", "s": "stop", "g": "go on"}
    with screen.asking():
        while True:
            click.echo(
                "\n[d]etach and let it go on there, [s]top it after saving, or [g]o on watching? ", nl=False
            )
            typed = asyncio.create_task(_line_of_input())
            again = asyncio.create_task(signals.next())
            await asyncio.wait({typed, again}, return_when=asyncio.FIRST_COMPLETED)
            if again.done():
                typed.cancel()
                click.echo()
                return "detached"
            again.cancel()
            answer = typed.result().strip().lower()[:1]
            if answer in answers:
                return answers[answer]
            if not typed.result():  # end of input
                return "detach"


async def _line_of_input() -> str:
    """By a thread that nobody waits for: a person may never answer."""
    loop = asyncio.get_running_loop()
    answered: asyncio.Future[str] = loop.create_future()

    def arrived(line: str) -> None:
        if not answered.done():
            answered.set_result(line)

    def read() -> None:
        line = sys.stdin.readline()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(arrived, line)

    threading.Thread(target=read, name="answer", daemon=True).start()
    return await answered


class Signals:
    """SIGINT and SIGTERM, one after the other, while the block lasts."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[int] = asyncio.Queue()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()

        def came(number: int, _frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self._queue.put_nowait, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, came)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    async def next(self) -> int:
        """The number of the next one."""
        return await self._queue.get()


def _tell_end(directory: Path, outcome: Outcome, *, quiet: bool) -> None:
    for host, ending in outcome.endings.items():
        if ending.get("exit_code") != 0:
            click.echo(f"error: {printable_lines(words_of(host, ending))}", err=True)
    if quiet:
        return
    if outcome.fetched.bytes:
        click.echo(
            f"fetched {human_bytes(outcome.fetched.bytes)} in {human_seconds(outcome.fetched.seconds)} to {directory}"
        )
    latest = directory / "checkpoints" / "latest"
    if latest.is_file():
        click.echo(f"checkpoint {directory / 'checkpoints' / latest.read_text(encoding='utf-8').strip()}")
        if outcome.exit_code == Interrupted.exit_code:
            click.echo(f"go on with: manyhands train --host={','.join(outcome.endings)} --resume {directory}")
