"""Updates that are not what they should be: each is refused in words, stands in the ledger, and delays nobody."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manyhands.coordination.events import Contributed
from manyhands.coordination.types import BlobRef
from manyhands.errors import Refused
from manyhands.identity.contributions import commit, new_nonce
from manyhands.identity.keys import ephemeral
from manyhands.network.blobs.manifest import CHUNK_BYTES, manifest_of


def test_a_file_that_is_no_update_is_refused_at_the_door(
    attack: Any, reason_of: Any, besieged: Any, door_fault: Any
) -> None:
    change, expected = door_fault

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(Refused) as refused:
            await hostile.contribute(work, path, claims)
        reason = await reason_of(hostile, work)
        assert any(part in reason for part in expected.split("|")), reason
        assert str(refused.value) in reason
        assert str(besieged.place) not in str(refused.value)

    attack(send)


def test_values_that_cannot_be_merged_are_refused_by_the_aggregator(
    attack: Any, reason_of: Any, value_fault: Any
) -> None:
    change, expected = value_fault

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        path.write_bytes(change(path.read_bytes()))
        await hostile.contribute(work, path, claims)  # the door does not look at values
        assert expected in await reason_of(hostile, work)

    attack(send)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.01, 1e30])
def test_a_norm_that_lies_is_refused(attack: Any, reason_of: Any, factor: float) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        await hostile.contribute(work, path, replace(claims, norm=factor * claims.norm))
        reason = await reason_of(hostile, work)
        assert "the update: the norm is" in reason
        assert "was claimed" in reason

    attack(send)


def test_an_honest_contribution_counts(attack: Any, besieged: Any) -> None:
    """Or the refusals here would show nothing."""

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        await hostile.contribute(work, path, claims)
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert row["counted"]

    attack(send)


# ------------------------------------------------------------------------------------------- size
def test_an_update_larger_than_the_plans_is_refused_when_it_is_announced(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        huge = BlobRef(blob="ab" * 32, size_bytes=10**12)
        _, nonce = await hostile.commit(work, huge)
        with pytest.raises(
            Refused, match="an update of 1000000000000 bytes; the plan's updates have at most"
        ):
            await hostile.open(work, huge, nonce)
        assert "an update of 1000000000000 bytes" in await reason_of(hostile, work)
        status, text = await hostile.request("PUT", f"/blobs/{huge.blob}", b"{}")
        assert (status, "not announced" in text) == (403, True)

    attack(send)


def test_a_manifest_of_another_size_than_announced_is_refused(
    attack: Any, reason_of: Any, tmp_path: Path
) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path = tmp_path / "large"
        path.write_bytes(bytes(5 * 1024 * 1024))
        manifest = manifest_of(path)
        small = BlobRef(blob=manifest.blob, size_bytes=1000)
        made, nonce = await hostile.commit(work, small)
        await hostile.open(work, small, nonce)
        status, text = await hostile.request("PUT", f"/blobs/{manifest.blob}", manifest.to_json())
        assert status == 403
        assert "was announced with 1000 bytes, not 5242880" in text
        _, claims = hostile.honest_update(work)
        contribution = hostile.signed(work, small, made, nonce, claims)
        with pytest.raises(Refused, match="is not in the store"):
            await hostile.connection.ask(Contributed(contribution=contribution))
        assert "is not in the store" in await reason_of(hostile, work)

    attack(send)


def test_a_body_larger_than_its_chunk_is_not_read(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, _ = hostile.honest_update(work)
        manifest = manifest_of(path)
        _, nonce = await hostile.commit(work, manifest.ref)
        await hostile.open(work, manifest.ref, nonce)
        blob = f"/blobs/{manifest.blob}"
        assert (await hostile.request("PUT", blob, manifest.to_json()))[0] == 200
        status, text = await hostile.request("PUT", f"{blob}/chunks/0", bytes(path.stat().st_size + 1))
        assert status == 413
        assert f"larger than the {path.stat().st_size} bytes" in text
        status, text = await hostile.request("PUT", f"{blob}/chunks/0", bytes(path.stat().st_size))
        assert (status, "SHA-256" in text) == (422, True)
        status, _ = await hostile.request("PUT", f"{blob}/chunks/7", b"")
        assert status == 404
        await hostile.say("that was it")
        assert "its session was ended" in await reason_of(hostile, work)

    attack(send)


def test_the_same_chunk_over_and_over_is_stopped(attack: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, _ = hostile.honest_update(work)
        manifest = manifest_of(path)
        _, nonce = await hostile.commit(work, manifest.ref)
        await hostile.open(work, manifest.ref, nonce)
        assert (await hostile.request("PUT", f"/blobs/{manifest.blob}", manifest.to_json()))[0] == 200
        chunk = f"/blobs/{manifest.blob}/chunks/0"
        for _ in range(4):
            reader, writer = await hostile.declare(chunk, CHUNK_BYTES)
            assert b"413" in await reader.readline()
            writer.close()
        answers = [await hostile.request("PUT", chunk, path.read_bytes()) for _ in range(3)]
        assert [status for status, _ in answers] == [204, 204, 429]  # three times its size, and some spare
        assert "were sent for blob" in answers[2][1]

    attack(send)


# ------------------------------------------------------------------------------------------- commits and signatures
def test_an_opening_that_does_not_fit_its_commit_is_refused(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, _ = hostile.honest_update(work)
        update = manifest_of(path).ref
        await hostile.commit(work, update)
        with pytest.raises(Refused, match="does not fit its commit"):
            await hostile.open(work, update, new_nonce())
        assert "does not fit its commit" in await reason_of(hostile, work)

    attack(send)


def test_an_opening_without_a_commit_is_refused(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, _ = hostile.honest_update(work)
        with pytest.raises(Refused, match="does not fit its commit"):
            await hostile.open(work, manifest_of(path).ref, new_nonce())
        assert "does not fit its commit" in await reason_of(hostile, work)

    attack(send)


def test_a_second_commit_does_not_replace_the_first(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        update = manifest_of(path).ref
        made, nonce = await hostile.commit(work, update)
        with pytest.raises(Refused, match="was committed to already"):
            await hostile.commit(work, BlobRef(blob="cd" * 32, size_bytes=10))
        await hostile.open(work, update, nonce)
        await hostile.send(path)
        contribution = hostile.signed(work, update, made, nonce, claims)
        await hostile.connection.ask(Contributed(contribution=contribution))
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert row["counted"]

    attack(send)


def test_another_update_than_the_one_committed_to_is_refused(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        update = manifest_of(path).ref
        made, nonce = await hostile.commit(work, update)
        await hostile.open(work, update, nonce)
        await hostile.send(path)
        contribution = hostile.signed(work, update, made, nonce, claims)
        other = replace(contribution, update=BlobRef(blob="ee" * 32, size_bytes=update.size_bytes))
        with pytest.raises(Refused, match="does not fit its commit"):
            await hostile.connection.ask(Contributed(contribution=other))
        assert "does not fit its commit" in await reason_of(hostile, work)

    attack(send)


@pytest.mark.parametrize("forgery", ["another key", "altered claims", "another run", "none"])
def test_a_contribution_that_its_client_has_not_signed_is_refused(
    attack: Any, reason_of: Any, forgery: str
) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        update = manifest_of(path).ref
        made, nonce = await hostile.commit(work, update)
        await hostile.open(work, update, nonce)
        await hostile.send(path)
        contribution = hostile.signed(work, update, made, nonce, claims)
        if forgery == "another key":
            stranger = ephemeral()
            signed = stranger.sign(b"whatever")
            contribution = replace(contribution, signature=signed)
        elif forgery == "altered claims":
            contribution = replace(contribution, claims=replace(claims, tokens=10**9))
        elif forgery == "another run":
            contribution = replace(contribution, signature=hostile.identity.sign(b"for another run"))
        else:
            contribution = replace(contribution, signature="")
        with pytest.raises(Refused, match="does not bear the signature"):
            await hostile.connection.ask(Contributed(contribution=contribution))
        assert "does not bear the signature" in await reason_of(hostile, work)

    attack(send)


def test_a_contribution_without_an_update_is_refused(attack: Any, reason_of: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        update = manifest_of(path).ref
        made, nonce = await hostile.commit(work, update)
        contribution = replace(hostile.signed(work, update, made, nonce, claims), update=None)
        with pytest.raises(Refused, match="needs its update"):
            await hostile.connection.ask(Contributed(contribution=contribution))
        assert "needs its update" in await reason_of(hostile, work)

    attack(send)


# ------------------------------------------------------------------------------------------- for others, and again
def test_nobody_contributes_to_somebody_elses_assignment(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        update = (await asyncio.to_thread(manifest_of, path)).ref
        number, _, ordinal = work.assignment.id.partition("-")
        for other in (int(ordinal) - 1, int(ordinal) + 1):  # one of these is the honest client's
            aimed = replace(work, assignment=replace(work.assignment, id=f"{number}-{other}"))
            with pytest.raises(Refused, match="is not open for this client"):
                await hostile.commit(aimed, update)
            with pytest.raises(Refused, match="is not open for this client"):
                await hostile.open(aimed, update, new_nonce())
            made = commit(
                "run", work.assignment.round, hostile.key, aimed.assignment.id, update.blob, "0" * 64
            )
            contribution = hostile.signed(aimed, update, made, "0" * 64, claims)
            with pytest.raises(Refused, match="is not open for this client"):
                await hostile.connection.ask(Contributed(contribution=contribution))
            theirs = replace(contribution, client=besieged.honest[0])
            with pytest.raises(Refused, match="cannot speak for"):
                await hostile.connection.ask(Contributed(contribution=theirs))
        await hostile.leave()
        await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)

    attack(send)


def test_a_contribution_of_an_earlier_round_counts_once(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        old = await hostile.contribute(work, path, claims)
        await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        later = await hostile.work()
        assert later.assignment.round > work.assignment.round

        # The same words again change nothing, and as words of the new round they fit no commit.
        await hostile.connection.ask(Contributed(contribution=old))
        moved = replace(old, assignment=later.assignment.id, round=later.assignment.round)
        with pytest.raises(Refused, match="does not fit its commit"):
            await hostile.connection.ask(Contributed(contribution=moved))

        row = await asyncio.to_thread(besieged.work_of, later.assignment.round, hostile.key)
        assert not row["counted"]
        assert "does not fit its commit" in row["reason"]
        rows = await asyncio.to_thread(besieged.get, "/api/runs/run/ledger")
        counted = [c for row in rows for c in row["closing"]["counted"] if c["client"] == hostile.key]
        assert len(counted) == 1

    attack(send)
