"""Progress of what takes long with shards: a line that is rewritten on a terminal, now and then one elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import click

from manyhands.ui.terminal import human_bytes, human_seconds

if TYPE_CHECKING:
    from manyhands.data.shards.making import Progress

_EVERY_S: Final = {True: 0.2, False: 10.0}
"""On a terminal, and elsewhere."""


class ProgressLine:
    """Says the latest text, on standard error; as a context, which ends the line."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._said, self._shown = 0.0, False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._shown:
            click.echo(err=True)

    def say(self, text: str, *, last: bool = False) -> None:
        now = time.monotonic()
        if now - self._said < _EVERY_S[self._terminal] and not last:
            return
        self._said, self._shown = now, True
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, nl=not self._terminal, err=True)

    def rows(self, progress: Progress) -> None:
        """Of shards that are being made."""
        self.say(rows_text(progress), last=progress.rows == progress.total)


def rows_text(progress: Progress) -> str:
    """As in '1,024 of 4,096 rows (25%), shard 1 of 4, 512 rows/s, about 6.0 s left'."""
    parts = [
        f"{progress.rows:,} of {progress.total:,} rows ({progress.rows / progress.total:.0%})",
        f"{progress.jobs} of {progress.total_jobs} shards",
    ]
    if progress.kept:
        parts.append(f"{progress.kept:,} rows kept of an earlier start")
    if progress.left_s is not None:
        parts.append(f"{progress.rows_per_s:,.0f} rows/s")
        parts.append(f"about {human_seconds(progress.left_s)} left")
    return ", ".join(parts)


@contextmanager
def bytes_read() -> Iterator[Callable[[int, int], None]]:
    """For what reads files: call with the bytes that are done and those in all."""
    started = time.monotonic()
    with ProgressLine() as line:

        def tell(done: int, total: int) -> None:
            left = (time.monotonic() - started) * (total - done) / max(done, 1)
            line.say(
                f"{human_bytes(done)} of {human_bytes(total)} read, about {human_seconds(left)} left",
                last=done == total,
            )

        yield tell
