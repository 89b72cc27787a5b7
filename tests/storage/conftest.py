"""Fixtures: an open database in a fresh directory, a run in it, and records to append."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyhands.coordination.effects import Effect, PhaseChanged
from manyhands.coordination.events import Joined
from manyhands.coordination.machine import NumberedEffect
from manyhands.coordination.records import Record
from manyhands.coordination.types import EVERYONE
from manyhands.storage.database import Database, open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import create_run

Batch = tuple[list[Record], list[NumberedEffect]]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / "server.db", busy_timeout_s=5)
    yield opened
    opened.close()


@pytest.fixture
def log(database: Database) -> RunLog:
    create_run(database, "run-1", b'{"plan":"x"}', "signature", created_ms=1)
    return RunLog(database, "run-1")


@pytest.fixture
def batch() -> Callable[..., Batch]:
    """batch(after, count, to=EVERYONE): `count` events after `after`, each with one effect to `to`."""

    def made(after: int, count: int = 1, to: str = EVERYONE) -> Batch:
        numbers = range(after + 1, after + count + 1)
        events = [
            Record(sequence=n, now_ms=1000 + n, seed=n * 7, event=Joined(client=f"{n:064x}", boot="b"))
            for n in numbers
        ]
        effects = [
            NumberedEffect(
                sequence=n, n=0, effect=Effect(to=to, body=PhaseChanged(phase="waiting", reason=str(n)))
            )
            for n in numbers
        ]
        return events, effects

    return made
