"""A run's account on its server: one view for all who look, and a window that forgets what the log still has."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manyhands.coordination.events import Joined, Left
from manyhands.coordination.ledger import account as whole_account
from manyhands.coordination.machine import initial_state
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.node.server import account
from manyhands.node.server.run_driver import RunDriver
from manyhands.node.server.signed_in import Sessions
from manyhands.node.server.views import RunViews
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import create_run, get_run

PLAN = Plan.parse({"task": {"name": "dummy"}, "membership": {"min_clients": 5}})
FIRST = Snapshot(round=0, blob=BlobRef(blob="0" * 64, size_bytes=1), fingerprint="f" * 64)
CLIENT = "a" * 64


class Run:
    """As much of a ServedRun as a view asks for."""

    def __init__(self, driver: RunDriver, directory: Path) -> None:
        self.driver, self.run_id, self.first, self.directory = driver, "run", FIRST, directory
        self.descriptor = SimpleNamespace(plan=PLAN, samples=100)


def with_run(place: Path, scenario: Callable[[Any, RunViews], Any]) -> None:
    """`scenario` on a run whose log is in a database of its own."""
    database = open_database(place / "manyhands.db")
    create_run(database, "run", b"{}", "s")
    descriptor = RunDescriptor(
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

    async def main() -> None:
        driver = RunDriver(RunLog(database, "run"), "here")
        await driver.start(descriptor, FIRST)
        try:
            async with asyncio.timeout(30):
                await scenario(Run(driver, place), RunViews(Sessions()))
        finally:
            await driver.stop()

    try:
        asyncio.run(main())
    finally:
        database.close()


async def come_and_go(driver: RunDriver, times: int) -> None:
    for number in range(times):
        await driver.submit(Joined(client=CLIENT, boot=f"{number:016x}"))
        await driver.submit(Left(client=CLIENT, how="left"))


def test_a_view_is_made_once_for_all_who_look(tmp_path: Path) -> None:
    async def scenario(run: Any, views: RunViews) -> None:
        first, same = await asyncio.gather(views.view(run), views.view(run))
        assert same is first
        await come_and_go(run.driver, 1)
        newer = await views.view(run)
        assert [incident.what for incident in newer.incidents] == ["joined", "left"]
        assert newer.started_ms == first.started_ms
        assert await views.view(run) is newer

    with_run(tmp_path, scenario)


def test_a_reader_hears_of_each_incident_once_though_the_old_ones_are_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "KEPT_INCIDENTS", 6)
    monkeypatch.setattr("manyhands.node.server.views.LOOK_EVERY_S", 0.01)

    async def scenario(run: Any, views: RunViews) -> None:
        changes = views.changes(run)
        heard = []
        for _ in range(5):
            view = None
            while view is None:
                view = await anext(changes)
            heard += [incident.ms for incident in view.incidents]
            await come_and_go(run.driver, 2)
        assert len(heard) == 16, "four changes of four incidents each, after an empty view"
        assert len((await views.view(run)).incidents) == 6
        await changes.aclose()

    with_run(tmp_path, scenario)


def test_a_restart_goes_on_from_the_kept_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "KEEP_EVERY_EVENTS", 10)
    monkeypatch.setattr(account, "KEPT_INCIDENTS", 6)
    kept = tmp_path / "account.json"

    async def scenario(run: Any, _: RunViews) -> None:
        initial = initial_state("run", PLAN, 100, FIRST)
        await come_and_go(run.driver, 6)  # events 2 to 13
        folded = await account.Account(run.driver, initial, kept).noted()
        assert folded.forgotten_incidents == 6
        read: list[int] = []
        records = run.driver.records
        monkeypatch.setattr(run.driver, "records", lambda after: (read.append(after), records(after))[1])
        assert await account.Account(run.driver, initial, kept).noted() == folded
        assert read == [9, 10], "the event that it was made from, and those after it"

        others = initial_state("other", PLAN, 100, FIRST)
        whole = kept.read_bytes()
        moved = json.loads(whole)
        moved[0]["seed"] += 1
        for spoiled in (whole[:-9], b"", json.dumps(moved).encode()):
            kept.write_bytes(spoiled)
            assert await account.Account(run.driver, initial, kept).noted() == folded
            assert kept.read_bytes() == whole, "made anew"
        read.clear()
        await account.Account(run.driver, others, kept).noted()
        assert read == [0], "another run's"

    with_run(tmp_path, scenario)


def test_old_rounds_are_forgotten_and_read_from_the_log_when_asked_for(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 8, "task.delay_s": 0.3})
    serving = (
        "import sys, manyhands; from manyhands.node.server import account; account.KEPT_WORKS = 7; "
        "account.KEEP_EVERY_EVENTS = 5; "
        "manyhands.serve(manyhands.load_plan(sys.argv[1]), manyhands.ServerOptions(port=int(sys.argv[2])))"
    )
    arguments = (sys.executable, "-c", serving, str(house.plan_file), str(house.port))
    server = house.start(house.program, "server", "server-home", *arguments)
    clients = [house.client("ann", "--patient"), house.client("ben", "--patient")]
    house.until_closed(5)
    until((house.server_home / "runs" / "run" / "server" / "account.json").exists, "the account to be kept")
    server.send(signal.SIGKILL)
    server.ended()
    server = house.start(house.program, "server", "server-home", *arguments)
    for client in clients:
        assert client.ended() == 0, client.text()
    view = house.until_phase("finished")
    assert [row["round"] for row in view["rounds"]] == [5, 6, 7], "two works each"
    assert {c["key"]: c["counted"] for c in view["clients"]} == {c.key: 8 for c in clients}
    assert {incident["round"] for incident in view["incidents"]} <= {5, 6, 7, 8}
    rounds = house.ledger()
    assert [row["number"] for row in rounds] == list(range(8))
    with urllib.request.urlopen(f"http://{house.address}/api/runs/run/changes", timeout=10) as changes:
        assert [row["round"] for row in json.loads(changes.readline()[6:])["rounds"]] == [5, 6, 7]
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0
    _check_forgetting(house.server_home / "server" / "manyhands.db")


def _check_forgetting(path: Path) -> None:
    """A ledger that forgets as it goes tells of the rest what one that has everything tells of it."""
    database = open_database(path, create=False)
    descriptor = RunDescriptor.model_validate_json(get_run(database, "run").descriptor)
    records = list(RunLog(database, "run").all_records())
    database.close()
    first = initial_state("run", descriptor.plan, descriptor.samples, FIRST)
    ledger = account.Ledger(first)
    for record in records:
        ledger.add(record)
        ledger.forget(max(0, len(ledger.state.history) and ledger.state.closed_rounds - 2))
    told, whole = ledger.finished(), whole_account(first, records)
    assert told.rounds == whole.rounds[-2:]
    assert told.state == whole.state
    assert told.checkpoints == whole.checkpoints[-1:]
    assert told.snapshots[-1] == whole.snapshots[-1]
