"""Real models in a mesh and in a star: the same bits everywhere, a client that is killed and comes back, and the
record of it all enough to do the run again without a single stored update."""

from __future__ import annotations

import signal
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from manyhands import simulate
from manyhands.coordination.events import Fingerprinted
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog

ALL = 3
KILLED_IN = 2
MESH = {"topology": "mesh", "outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9}}
DILOCO = {
    "preset": "diloco",
    "codec": {"name": "int8", "error_feedback": True},
    "change_codec": {"name": "int8"},
}


@pytest.mark.parametrize("choices", [MESH, DILOCO], ids=["mesh", "star"])
def test_a_killed_client_comes_back_and_the_replay_has_the_same_bits(
    house: Any, tiny_gpt: dict[str, Any], until: Callable[..., Any], choices: dict[str, Any]
) -> None:
    # With as many clients needed as there are the run waits for the one that is killed.
    house.plan(tiny_gpt, {**choices, "membership.min_clients": ALL, "rounds.lost_after_s": 300})
    server = house.server()
    clients = [house.client(name) for name in ("ann", "ben", "cleo")]
    victim = clients[1]
    until(lambda: victim.said("work", round=KILLED_IN), "the victim to work")
    victim.kill()
    back = house.client("ben")
    until(lambda: house.counted(back, KILLED_IN + 1), "contributions after its return")
    for client in (clients[0], back, clients[2]):
        assert client.ended() == 0, client.text()
    house.until_phase("finished")
    assert "rejoined" in house.incidents(back)
    assert all("resynced" not in house.incidents(client) for client in clients)
    rounds = house.ledger()
    assert all(row["fingerprint"] for row in rounds)
    assert len({row["fingerprint"] for row in rounds}) == len(rounds)
    starts = [
        work["contribution"]["claims"]["start"]
        for row in rounds
        for work in row["works"]
        if work["contribution"] and work["assignment"]["client"] == back.key
    ]
    assert starts.count("fresh") == 1, f"its local state survived the kill: {starts}"
    server.send(signal.SIGTERM)
    assert server.ended(10) == 0

    if choices is MESH:
        reports = _reported_fingerprints(house)
        assert set(reports) == set(range(len(rounds)))
        for row in rounds:
            assert set(reports[row["number"]].values()) == {row["fingerprint"]}
            if row["number"] != KILLED_IN:  # of that round the newcomer may have loaded the snapshot
                assert len(reports[row["number"]]) >= ALL - 1
    _delete_updates(house, rounds)
    threads = torch.get_num_threads()
    replayed = simulate(ledger="run", data_dir=house.server_home / "server")
    assert replayed.equal, replayed.first_difference
    assert [r.replayed for r in replayed.rounds] == [row["fingerprint"] for row in rounds]
    assert torch.get_num_threads() == threads


def _reported_fingerprints(house: Any) -> dict[int, dict[str, str]]:
    """By round what each client has said of its own public, from the log."""
    database = open_database(house.server_home / "server" / "manyhands.db", create=False)
    reports: dict[int, dict[str, str]] = defaultdict(dict)
    for record in RunLog(database, "run").all_records():
        if isinstance(record.event, Fingerprinted):
            reports[record.event.round][record.event.client] = record.event.fingerprint
    database.close()
    return reports


def _delete_updates(house: Any, rounds: list[dict[str, Any]]) -> None:
    store = house.server_home / "server" / "blobs" / "objects"
    for row in rounds:
        for work in row["works"]:
            if work["contribution"]:
                name = work["contribution"]["update"]["blob"]
                (store / name[:2] / name).unlink(missing_ok=True)
        if row["change"]:
            name = row["change"]["blob"]
            (store / name[:2] / name).unlink(missing_ok=True)
