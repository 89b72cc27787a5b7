"""Who watches trainings on other hosts, and leaves them.

In a terminal the first Ctrl-C asks what is meant, a second one detaches; without a terminal every signal detaches:
the trainings go on there in any case, and `manyhands hosts attach` shows them again.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any, Literal, Self, TypeVar

import click

from manyhands.errors import Interrupted, ManyhandsError
from manyhands.hosts.record import Record
from manyhands.hosts.watching import stop, stop_in_words
from manyhands.ui.live import Screen

T = TypeVar("T")
Left = Literal["chosen", "signal"]
"""How a person has detached: by an answer, or by a signal."""


async def attended(
    watching: asyncio.Future[T], screen: Screen, on_stop: Callable[[], Awaitable[None]]
) -> Left | None:
    """Wait for `watching`, and listen to the person in front of it; how that one has left, None where it ended."""
    with Signals() as signals:
        try:
            while not watching.done():
                asked = asyncio.create_task(signals.next())
                both: set[asyncio.Future[Any]] = {watching, asked}
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if not asked.done():
                    asked.cancel()
                    break
                ask = asked.result() == signal.SIGINT and sys.stdin.isatty() and sys.stdout.isatty()
                answer = await _asked(screen, signals) if ask else "signal"
                if answer == "stop":
                    await on_stop()
                elif answer != "go on":
                    return "chosen" if answer == "detach" else "signal"
            return None
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


def detached(records: Sequence[Record], left: Left, more: str = "") -> int:
    """Say how to see them again, and `more`. Raises Interrupted where nobody has chosen it."""
    text = "\n".join(
        f"{record.run} goes on at {', '.join(part.host for part in record.parts)}; see it again with: manyhands "
        f"hosts attach {record.run}"
        for record in records
    )
    text = "\n".join(part for part in (text, more) if part)
    if left == "chosen":
        click.echo(text)
        return 0
    raise Interrupted(text)


async def stop_all(records: Sequence[Record], tell: Callable[[str], None]) -> None:
    """Ask all of them to save and end."""
    for record in records:
        for part in record.parts:
            try:
                status = await stop(part, now=False)
                tell(f"{part.host} {stop_in_words(status, now=False)}")
            except ManyhandsError as error:
                tell(f"{part.host} could not be asked to end: {error}")


async def _asked(screen: Screen, signals: Signals) -> str:
    """What a person means by Ctrl-C; a second one is a signal again."""
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
                return "signal"
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
        with suppress(RuntimeError):  # the loop has ended
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
