"""What is deleted on the server, and what stays: for newcomers, for who is behind, for a replay and for people."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manyhands.coordination.machine import initial_state
from manyhands.coordination.state import Client, RunState
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.node.server.retention import no_longer_needed_before
from manyhands.plan.schema import Plan


def _state(**changes: Any) -> RunState:
    plan = Plan.parse({"task": {"name": "dummy"}, "rounds": {"keep_updates": 2}})
    snapshots = tuple(_snapshot(number) for number in (0, 5, 10))
    state = initial_state("run", plan, 100, snapshots[0])
    return dataclasses.replace(state, closed_rounds=12, snapshots=snapshots, **changes)


def _snapshot(number: int) -> Snapshot:
    return Snapshot(round=number, blob=BlobRef(blob=f"{number:064x}", size_bytes=1), fingerprint="f")


def _client(key: str, status: Any, at: int | None) -> tuple[str, Client]:
    return key, Client(key=key, boot="b", label="", status=status, round=at)


def test_what_is_stored_and_not_yet_known_is_never_deleted() -> None:
    assert no_longer_needed_before(_state()) == {"update": 10, "change": 12, "snapshot": 10}


def test_who_is_behind_still_finds_what_it_has_not_applied() -> None:
    clients = dict([_client("a", "ready", 12), _client("b", "ready", 7), _client("c", "lost", 1)])
    clients |= dict([_client("d", "catching_up", None)])
    found = no_longer_needed_before(_state(clients=clients))
    assert found == {"update": 7, "change": 7, "snapshot": 10}


def test_a_star_keeps_the_first_snapshot_two_more_and_the_changes_since(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    changes = {"rounds.total": 9, "rounds.snapshot_every": 2, "membership.min_clients": 1}
    house.plan(dummy_plan, changes)
    house.server()
    client = house.client("ann")
    assert client.ended() == 0, client.text()
    house.until_phase("finished")
    expected = {"snapshot": [0, 8, 9], "change": [8], "update": [8]}
    until(lambda: _kept(house) == expected, "the rest to be deleted", 20)
    assert _material_is_there(house)
    left = {p.name for p in _store(house).glob("??/*") if "." not in p.name}
    assert left == _indexed(house), "files and index differ"


def _store(house: Any) -> Path:
    return Path(house.server_home / "server" / "blobs" / "objects")


def _rows(house: Any) -> list[tuple[str, str, int | None]]:
    with contextlib.closing(sqlite3.connect(house.server_home / "server" / "manyhands.db")) as database:
        return list(database.execute("select blob, kind, round from blobs order by round"))


def _kept(house: Any) -> dict[str, list[int | None]]:
    kept: dict[str, list[int | None]] = {"snapshot": [], "change": [], "update": []}
    for _, kind, number in _rows(house):
        if kind in kept:
            kept[kind].append(number)
    return kept


def _indexed(house: Any) -> set[str]:
    return {blob for blob, _, _ in _rows(house)}


def _material_is_there(house: Any) -> bool:
    materials = [blob for blob, kind, _ in _rows(house) if kind == "material"]
    return all((_store(house) / blob[:2] / blob).exists() for blob in materials)
