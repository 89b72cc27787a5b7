"""The driver over a real log: what it keeps of the effects, and what a restart finds."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from manyhands.coordination.effects import PhaseChanged
from manyhands.coordination.events import Joined, Left, ServerStarted
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.errors import Fenced, StorageError
from manyhands.node.server import run_driver
from manyhands.node.server.run_driver import RunDriver
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.storage import events
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
        assert len(list(again.records(0))) == again.state.sequence, "events are kept for good"
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


@pytest.mark.parametrize("clean", [True, False], ids=["after an end", "after a death"])
def test_the_downtime_is_that_of_the_server_and_not_that_of_the_run(
    database: Database, monkeypatch: pytest.MonkeyPatch, clean: bool
) -> None:
    """A server that nothing happens to is there all the same."""
    clock = [1_000_000]
    monkeypatch.setattr(run_driver, "clock_ms", lambda: clock[0])
    monkeypatch.setattr(events, "_clock", lambda _: clock[0])
    monkeypatch.setattr(run_driver, "ALIVE_EVERY_S", 1000.0 if clean else 0.0)
    log = RunLog(database, "run")
    if not clean:
        monkeypatch.setattr(log, "release", lambda _: None)

    async def scenario() -> None:
        first = RunDriver(log, "here")
        await first.start(descriptor(), FIRST)
        clock[0] += 50_000
        async with asyncio.timeout(20):
            while not clean and log.lease().renewed_ms != clock[0]:
                await asyncio.sleep(0.05)
        await first.stop()
        clock[0] += 7_000
        second = RunDriver(log, "here")
        await second.start(descriptor(), FIRST)
        await second.stop()
        *_, last = second.records(0)
        assert last.event == ServerStarted(downtime_ms=7_000)

    asyncio.run(scenario())


def test_a_server_that_nothing_happens_to_learns_that_it_was_replaced(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_driver, "ALIVE_EVERY_S", 0.0)

    async def scenario() -> None:
        driver = RunDriver(RunLog(database, "run"), "here")
        await driver.start(descriptor(), FIRST)
        RunLog(database, "run").acquire("there")
        async with asyncio.timeout(20):
            with pytest.raises(Fenced, match="it is now at there"):
                await driver.failed
        await driver.stop()

    asyncio.run(scenario())
