"""The driver over a real log: what it keeps of the effects, and what a restart finds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from manyhands.coordination.types import BlobRef, Joined, Left, PhaseChanged, Snapshot
from manyhands.errors import StorageError
from manyhands.node.server import run_driver
from manyhands.node.server.run_driver import RunDriver
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.storage.database import Database, open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import create_run
from manyhands.storage.tables import effects, state_snapshots

PLAN = Plan.parse({"task": {"name": "dummy"}, "membership": {"min_clients": 1}})
FIRST = Snapshot(round=0, blob=BlobRef(blob="0" * 64, size_bytes=1), fingerprint="f" * 64)
EVERY = 6


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / "manyhands.db")
    create_run(opened, "run", b"{}", "s")
    yield opened
    opened.close()


def descriptor() -> RunDescriptor:
    return RunDescriptor(
        run_id="run",
        plan=PLAN,
        plan_hash=plan_hash(PLAN),
        samples=100,
        parameters=(),
        materials={},
        first_snapshot={"blob": "0" * 64, "size_bytes": 1},
        first_fingerprint="f" * 64,
        server_key="0" * 64,
    )


async def come_and_go(driver: RunDriver, times: int) -> list[int]:
    """Each time two events, which tell the client something; the sequence numbers of its joining."""
    joined = []
    for number in range(times):
        joined.append(await driver.submit(Joined(client="a" * 64, boot=f"{number:016x}")))
        await driver.submit(Left(client="a" * 64, how="left"))
    return joined


def first_and_count(database: Database, table: sa.Table) -> tuple[int, int]:
    query = sa.select(sa.func.min(table.c.sequence), sa.func.count())
    with database.read() as connection:
        first, count = connection.execute(query).one()
    return int(first or 0), int(count)


def test_effects_older_than_the_last_state_but_one_are_dropped(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_driver, "SNAPSHOT_EVERY_EVENTS", EVERY)

    async def scenario() -> None:
        driver = RunDriver(RunLog(database, "run"), "here")
        await driver.start(descriptor(), FIRST)
        joined = await come_and_go(driver, 40)
        first, _ = first_and_count(database, effects)
        assert joined[-1] - 2 * EVERY - 2 <= first <= joined[-1] - EVERY + 1
        assert first_and_count(database, state_snapshots)[1] == 1
        with pytest.raises(StorageError, match="has to join anew"):
            await driver.missed("a" * 64, (joined[0], 0))
        kept = await driver.missed("a" * 64, (joined[-1], 0))
        assert any(isinstance(delivery.body, PhaseChanged) for delivery in kept)
        state = driver.state
        await driver.stop()

        again = RunDriver(RunLog(database, "run"), "here")
        await again.start(descriptor(), FIRST)
        assert again.state.clients == state.clients
        assert len(again.records) == again.state.sequence, "events are kept for good"
        await again.stop()

    asyncio.run(scenario())


def test_nothing_is_dropped_before_the_second_state(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_driver, "SNAPSHOT_EVERY_EVENTS", EVERY)

    async def scenario() -> None:
        driver = RunDriver(RunLog(database, "run"), "here")
        await driver.start(descriptor(), FIRST)
        joined = await come_and_go(driver, 4)
        assert await driver.missed("a" * 64, (joined[0], 0))
        await driver.stop()

    asyncio.run(scenario())
