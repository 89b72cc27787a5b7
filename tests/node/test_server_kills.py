"""kill -9 of the server after every append, between its effects, and before every append: the run goes on where it
was. Enumerated, not random: see killing_server.py. Two clients live through all of it."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from manyhands.coordination.events import ServerStarted
from manyhands.coordination.machine import initial_state, tick
from manyhands.coordination.records import Record
from manyhands.coordination.state import RunState
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.plan.descriptor import RunDescriptor
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.storage.records import read_state
from manyhands.storage.runs import get_run

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

LAUNCHER = Path(__file__).with_name("killing_server.py")
ROUNDS = 2


@pytest.mark.parametrize("topology", ["star", "mesh"])
@pytest.mark.parametrize("mode", ["after-append", "between-effects", "before-append"])
def test_the_run_goes_on_where_it_was(
    house: Any, dummy_plan: dict[str, Any], mode: str, topology: str
) -> None:
    plan = {
        "topology": topology,
        "rounds.total": ROUNDS,
        "rounds.suspected_after_s": 60,  # nobody is to be given up while the server is away
        "rounds.lost_after_s": 120,
        "task.parameters": 50_000,
    }
    house.plan(dummy_plan, plan)
    journal = house.place / "journal.jsonl"
    server = _start_killing_server(house, mode, journal)
    clients = [house.client("ann", "--patient"), house.client("ben", "--patient")]
    for client in clients:
        assert client.ended(150) == 0, client.text()[-3000:]
    view = house.until_phase("finished")
    server.send(signal.SIGTERM)
    assert server.ended(20) == 0, server.text()[-3000:]

    assert [len(r["counted"]) for r in view["rounds"]] == [2] * ROUNDS
    initial, records = _log_of(house)
    notes = [json.loads(line) for line in journal.read_text().splitlines()]
    finished = _check_states(initial, records, notes)
    _check_nothing_acknowledged_was_lost(initial, records, notes)
    killed_after = [note["killed_after"] for note in notes if "killed_after" in note]
    progress = [r.sequence for r in records if not isinstance(r.event, ServerStarted)]
    wanted = [number for number in progress if number <= finished]
    assert len(killed_after) > 10
    if mode == "after-append":
        assert killed_after[: len(wanted)] == wanted, "every event was followed by a kill"
    else:  # several events may have been one append: then its last one
        assert set(killed_after) <= set(progress)
    for client in clients:
        assert len(client.said("joined")) == 1
        mine = [i["what"] for i in view["incidents"] if i["client"] == client.key]
        assert "rejoined" not in mine
        assert "lost" not in mine


def _start_killing_server(house: Any, mode: str, journal: Path) -> Any:
    arguments = ("server", "run", "--plan", str(house.plan_file), "--port", str(house.port))
    command = (sys.executable, str(LAUNCHER), mode, str(journal), *arguments)
    return house.start(house.program, "server", "server-home", *command)


def _log_of(house: Any) -> tuple[RunState, list[Record]]:
    database = open_database(house.server_home / "server" / "manyhands.db", create=False)
    descriptor = RunDescriptor.model_validate_json(get_run(database, "run").descriptor)
    blob = descriptor.first_snapshot
    first = Snapshot(
        round=0,
        blob=BlobRef(blob=blob.blob, size_bytes=blob.size_bytes),
        fingerprint=descriptor.first_fingerprint,
    )
    records = list(RunLog(database, "run").all_records())
    database.close()
    return initial_state("run", descriptor.plan, descriptor.samples, first), records


def _check_states(initial: RunState, records: list[Record], notes: list[dict[str, Any]]) -> int:
    """Each life began with the state that the log gives, and in every state every sample is somewhere, once.

    Returns the sequence number with which the run was finished.
    """
    began = {note["began"]: note["state"] for note in notes if "began" in note}
    state, finished = initial, 0
    for record in records:
        state = tick(state, [record.event], record.now_ms, record.seed).state
        for books in (*state.older_data, state.data):
            parts = (books.free, *books.assigned.values(), *books.pending.values())
            assert sum(len(r) for ranges in parts for r in ranges) + books.counted == books.total
        expected = began.pop(state.sequence, None)
        assert expected is None or read_state(expected) == state
        if state.phase == "finished" and not finished:
            finished = state.sequence
    assert not began, "a life began with events that are not in the log"
    assert finished
    return finished


def _check_nothing_acknowledged_was_lost(
    initial: RunState, records: list[Record], notes: list[dict[str, Any]]
) -> None:
    """What was acknowledged or delivered is in the log, as it was."""
    kinds = {record.sequence: record.event.kind for record in records}
    acknowledged = [note for note in notes if "acknowledged" in note]
    assert acknowledged
    assert all(kinds[note["acknowledged"]] == note["kind"] for note in acknowledged)
    state, effects = initial, {}
    for record in records:
        done = tick(state, [record.event], record.now_ms, record.seed)
        state = done.state
        effects |= {effect.id: effect.effect.body.kind for effect in done.effects}
    for note in notes:
        if "delivered" in note:
            assert effects[tuple(note["delivered"])] == note["kind"]
