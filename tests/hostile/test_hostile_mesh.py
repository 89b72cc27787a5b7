"""Hostile clients in a mesh: three honest witnesses refuse what is not sound, whatever a fourth one says, and all of
them hold the same bits after every round. What is refused at the door in a star is refused there in a mesh too."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from manyhands.coordination.events import Contributed, Fingerprinted, SnapshotStored, Verdict
from manyhands.coordination.types import Snapshot
from manyhands.errors import Refused
from manyhands.identity.contributions import new_nonce
from manyhands.network.blobs.manifest import manifest_of
from manyhands.network.messages import SnapshotOffer
from manyhands.plan.wire import snapshot_schema
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.updates.snapshots import held_by, save_arrays

HONEST = 3
MESH = {
    "topology": "mesh",
    "outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.9},
    "membership": {"min_clients": HONEST},
    "rounds": {"suspected_after_s": 20},  # so that a busy machine is not taken for an absent client
}


pytestmark = pytest.mark.usefixtures("equal_bits")


@pytest.fixture(scope="module")
def besieged(besiege: Any) -> Any:
    return besiege(HONEST, **MESH)


@pytest.fixture
def equal_bits(besieged: Any) -> Iterator[None]:
    """After every round the honest clients have held the same public and the same outer state."""
    yield
    database = open_database(besieged.place / "server" / "server" / "manyhands.db", create=False)
    events = [record.event for record in RunLog(database, "run").all_records()]
    database.close()
    held: dict[int, list[Any]] = defaultdict(list)
    for event in events:
        if isinstance(event, Fingerprinted) and event.client in besieged.honest:
            held[event.round].append(event.held)
    assert len(held) >= besieged.closed() - 1
    assert all(len(set(reports)) == 1 for reports in held.values())
    assert {len(reports) for number, reports in held.items() if number < max(held)} == {HONEST}
    assert all(report.outer for reports in held.values() for report in reports)
    incidents = besieged.view()["incidents"]
    assert not [i for i in incidents if i["client"] in besieged.honest and i["what"] == "resynced"]


def test_an_honest_contribution_counts(attack: Any, besieged: Any) -> None:
    """Or the refusals here would show nothing."""

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        await hostile.contribute(work, path, claims)
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert row["counted"]

    attack(send)


@pytest.mark.parametrize("fault", ["truncated", "another shape"])
def test_a_file_that_is_no_update_is_refused_at_the_door(
    attack: Any, reason_of: Any, spoiling: Any, fault: str
) -> None:
    change, expected = spoiling.AT_THE_DOOR[fault]

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(Refused):
            await hostile.contribute(work, path, claims)
        assert expected in await reason_of(hostile, work)

    attack(send)


def test_values_that_cannot_be_merged_are_refused_by_the_witnesses(
    attack: Any, reason_of: Any, value_fault: Any
) -> None:
    change, expected = value_fault

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        path.write_bytes(change(path.read_bytes()))
        await hostile.contribute(work, path, claims)
        reason = await reason_of(hostile, work)
        assert "witnesses object: " in reason
        assert expected in reason

    attack(send)


@pytest.mark.parametrize("factor", [0.0, 1.01])
def test_a_norm_that_lies_is_refused(attack: Any, reason_of: Any, factor: float) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        await hostile.contribute(work, path, replace(claims, norm=factor * claims.norm))
        assert "witnesses object: the update: the norm is" in await reason_of(hostile, work)

    attack(send)


def test_an_opening_that_does_not_fit_its_commit_is_refused(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        update = manifest_of(path).ref
        made, nonce = await hostile.commit(work, update)
        with pytest.raises(Refused, match="does not fit its commit"):
            await hostile.open(work, update, new_nonce())
        contribution = hostile.signed(work, update, made, nonce, claims)
        with pytest.raises(Refused, match="was given back"):  # the right one comes too late
            await hostile.connection.ask(Contributed(contribution=contribution))
        assert "does not fit its commit" in await reason_of(hostile, work)

    attack(send)


def test_verdicts_on_what_was_never_sent_mean_nothing(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        number, _, own = work.assignment.id.partition("-")
        for ordinal in range(int(own) - HONEST, int(own) + HONEST + 1):  # nothing is revealed yet
            for accepted in (False, True):
                await hostile.judge(int(number), f"{number}-{ordinal}", accepted)
        await hostile.judge(int(number) + 7, f"{int(number) + 7}-0", False)
        verdict = Verdict(
            by=besieged.honest[0], round=int(number), assignment=work.assignment.id, accepted=True
        )
        with pytest.raises(Refused, match="cannot speak for"):
            await hostile.connection.ask(verdict)
        path, claims = hostile.honest_update(work)
        await hostile.contribute(work, path, claims)
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert row["counted"]

    attack(send)


@pytest.mark.parametrize("accepts", [True, False], ids=["yes", "no"])
def test_a_witness_that_always_says_the_same_changes_nothing(
    attack: Any, besieged: Any, reason_of: Any, spoiling: Any, accepts: bool
) -> None:
    """One says of everything the same, the other sends first a sound update and then one with NaN."""
    change, expected = spoiling.IN_THE_VALUES["not a number"]

    async def send(witness: Any, sender: Any) -> None:
        witness.verdict = accepts
        first = await witness.work()
        await witness.give_back(first)
        idle = asyncio.create_task(_without_work(witness))
        while (work := await sender.work()).assignment.round <= first.assignment.round:
            await sender.give_back(work)
        path, claims = sender.honest_update(work)
        await sender.contribute(work, path, claims)
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, sender.key)
        assert row["counted"], "and so were the honest ones, as work_of has seen"
        work = await sender.work()
        path, claims = sender.honest_update(work)
        path.write_bytes(change(path.read_bytes()))
        await sender.contribute(work, path, claims)
        assert expected in await reason_of(sender, work)
        idle.cancel()

    attack(send, 2)


async def _without_work(hostile: Any) -> None:
    """Nobody has to wait for it."""
    while True:
        await hostile.give_back(await hostile.works.get())


# ------------------------------------------------------------------------------------------- snapshots
def test_a_snapshot_that_does_not_hold_what_is_said_of_it_is_refused(besiege: Any, hostile_at: Any) -> None:
    """The only client there is agreed with by nobody but itself; the server looks at the file."""
    alone = besiege(0, **MESH | {"membership": {"min_clients": 1}, "rounds": {"snapshot_every": 1}})

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        await hostile.contribute(work, *hostile.honest_update(work))
        number = await hostile.snapshots_asked.get()
        plan, parameters = hostile.descriptor.plan, hostile.descriptor.parameters
        arrays = {
            name: np.ones(shape, np.float32)
            for name, (_, shape) in snapshot_schema(plan, parameters, outer=True).items()
        }
        path, held = hostile.place / "snapshot", held_by(arrays)
        save_arrays(arrays, path)
        blob = manifest_of(path).ref
        await hostile.connection.ask(SnapshotOffer(round=number, blob=blob))
        await hostile.send(path)
        for public, outer, expected in (
            (held.public, "ab" * 32, r"fingerprint of its outer state is \w{16}\.\.\., expected abababab"),
            ("cd" * 32, held.outer, r"fingerprint of its public is \w{16}\.\.\., expected cdcdcdcd"),
            (held.public, None, "that the plan does not name"),
        ):
            lie = Snapshot(round=number, blob=blob, fingerprint=public, outer_fingerprint=outer)
            with pytest.raises(Refused, match=expected):
                await hostile.connection.ask(SnapshotStored(by=hostile.key, snapshot=lie))
        true = Snapshot(round=number, blob=blob, fingerprint=held.public, outer_fingerprint=held.outer)
        await hostile.connection.ask(SnapshotStored(by=hostile.key, snapshot=true))

    async def whole() -> None:
        async with asyncio.timeout(60), hostile_at(alone) as hostile:
            await send(hostile)

    asyncio.run(whole())
    alone.names.append("newcomer")
    alone.begin_client("newcomer")
    closed = alone.closed()
    alone.until(lambda: alone.closed() >= closed + 2, "rounds of a newcomer, from that snapshot")
