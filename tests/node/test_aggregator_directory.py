"""The aggregator's directory is lost while the server is down: the run is paused and says why, and is never reset."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from typing import Any


def test_a_lost_directory_pauses_the_run_until_it_is_back(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    house.plan(dummy_plan, {"rounds.total": 6, "task.delay_s": 0.5, "outer.name": "nesterov"})
    server = house.server()
    clients = [house.client("ann"), house.client("ben")]
    house.until_closed(2)
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0, server.text()
    place = house.server_home / "runs" / "run" / "server" / "aggregator"
    place.rename(place.with_name("aside"))

    server = house.server()
    paused = house.until_phase("paused")
    assert "it was lost, exchanged, or is an old copy" in paused["reason"]
    assert "Restore" in paused["reason"]
    assert str(house.place) not in paused["reason"], "clients hear the reason"
    assert str(place) in server.text()
    before = paused["closed_rounds"]
    fingerprints = [r["fingerprint"] for r in house.ledger()]

    resumed = house.command("server", "resume", "--server-addr", house.address)
    assert resumed.returncode == 0, resumed.stderr
    until(lambda: server.text().count("the run is paused") == 2, "the aggregator to look once more")
    house.until_phase("paused")
    shutil.rmtree(place)
    place.with_name("aside").rename(place)
    resumed = house.command("server", "resume", "--server-addr", house.address)
    assert resumed.returncode == 0, resumed.stderr
    for client in clients:
        assert client.ended() == 0, client.text()
    house.until_phase("finished")
    rounds = house.ledger()
    assert [r["fingerprint"] for r in rounds][:before] == fingerprints[:before]
    assert sum(bool(r["closing"]["counted"]) for r in rounds) >= 4
    assert all("resynced" not in house.incidents(client) for client in clients)


def test_a_snapshot_of_this_round_is_enough_where_nothing_else_was_lost(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any]
) -> None:
    changes = {"rounds.total": 5, "rounds.snapshot_every": 1, "task.delay_s": 0.5, "outer.name": "sgd"}
    house.plan(dummy_plan, changes)
    server = house.server()
    clients = [house.client("ann"), house.client("ben")]
    house.until_closed(2)
    asked = house.command("server", "pause", "--server-addr", house.address)
    assert asked.returncode == 0, asked.stderr
    until(lambda: _is_at_rest(house), "the open round to close and its snapshot to be stored")
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0, server.text()
    shutil.rmtree(house.server_home / "runs" / "run" / "server" / "aggregator")

    house.server()
    resumed = house.command("server", "resume", "--server-addr", house.address)
    assert resumed.returncode == 0, resumed.stderr
    for client in clients:
        assert client.ended() == 0, client.text()
    house.until_phase("finished")
    assert all(len(r["closing"]["counted"]) == 2 for r in house.ledger())
    assert all("resynced" not in house.incidents(client) for client in clients)


def _is_at_rest(house: Any) -> bool:
    """Paused, no round open any more, and the snapshot of the last closing accepted."""
    if house.view().get("phase") != "paused":
        return False
    before = _events(house)
    time.sleep(1.5)  # an open round's work takes 0.5 s
    kinds = _events(house)
    return kinds == before and kinds.count("snapshot_stored") == kinds.count("advanced")


def _events(house: Any) -> list[str]:
    with contextlib.closing(sqlite3.connect(house.server_home / "server" / "manyhands.db")) as database:
        bodies = [row[0] for row in database.execute("select body from events order by sequence")]
    return [json.loads(body)["kind"] for body in bodies]
