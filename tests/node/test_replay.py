"""A networked run is done again from what its server has kept."""

from __future__ import annotations

from typing import Any

from manyhands import simulate


def test_work_in_micro_batches_is_replayed_in_the_same_ones(house: Any, tiny_gpt: dict[str, Any]) -> None:
    house.plan(tiny_gpt, {"rounds.total": 2, "membership.min_clients": 1})
    house.server()
    client = house.client("ann", "--micro-batch-size", "3")
    assert client.ended() == 0, client.text()
    house.until_phase("finished")
    works = [work for row in house.ledger() for work in row["works"] if work["contribution"]]
    assert [work["contribution"]["claims"]["micro_batch"] for work in works] == [3, 3]
    replayed = simulate(ledger="run", data_dir=house.server_home / "server")
    assert len(replayed.rounds) == 2
    assert replayed.equal, replayed.first_difference
