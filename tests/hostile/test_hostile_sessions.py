"""Clients that say what they should not, too much of it, or too slowly: they are told so, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import pytest

from manyhands.coordination.events import Fingerprinted, Left, Ready, SnapshotStored, Verdict, WorkFailed
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.errors import Refused
from manyhands.identity.contributions import new_nonce
from manyhands.identity.keys import ephemeral
from manyhands.network.blobs.manifest import manifest_of
from manyhands.network.messages import Challenge, Hello, Intent, SnapshotOffer, encode, from_server
from manyhands.network.sign_in import answer
from manyhands.node.server.limits import MAX_BODIES, MAX_HEADERS_BYTES, MAX_SIGNING_IN

GARBAGE: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ("GET / HTTP/1.1", "Invalid JSON"),
    "another JSON": ("[1, 2, 3]", "should be an object"),
    "an unknown type": ('{"type": "sudo"}', "Input tag 'sudo'"),
    "a server's message": ('{"type": "goodbye", "reason": "x", "final": true}', "Input tag 'goodbye'"),
    "an event that is not a client's": (
        '{"type": "intent", "id": "a", "body": {"kind": "advanced", "round": 0, "change": null, "fingerprint": ""}}',
        "Input tag 'advanced'",
    ),
    "a second hello": (
        encode(Hello(versions=(1,), run_id="run", client="a" * 64, nonce="b" * 64, boot="c" * 32)),
        "not expected after the sign-in",
    ),
    "not a number": ('{"type": "heartbeat", "progress": {"loss": NaN}}', "finite number"),
    "a negative round": (
        json.dumps({"type": "intent", "id": "a", "body": {"kind": "ready", "client": "a" * 64, "round": -1}}),
        "expected 0 to",
    ),
    "deep nesting": ("[" * 50_000, "recursion limit"),
    "a binary message": (b"\x00\x01", "a binary message"),
    "300 KB": ('{"type": "' + "x" * 300_000 + '"}', "bytes; at most 262144 are accepted"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GARBAGE)
def test_garbage_ends_the_session_with_the_reason(
    attack: Any, last_word: Any, reason_of: Any, kind: str
) -> None:
    text, expected = GARBAGE[kind]

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        token = hostile.connection.holder.headers["Authorization"]
        await hostile.say(text)
        said = await last_word(hostile)
        assert expected in said
        assert len(said) < 500
        reason = await reason_of(hostile, work)
        assert "its session was ended" in reason
        assert expected in reason
        status, _ = await hostile.request("GET", f"/blobs/{'0' * 64}/manifest", token=token)
        assert status == 401  # the token went with the session

    attack(send)


def test_far_too_large_a_message_is_cut_off_unread(attack: Any) -> None:
    async def send(hostile: Any) -> None:
        socket = hostile.connection._socket
        with contextlib.suppress(ConnectionError):
            await hostile.say("x" * 2_000_000)
        for _ in range(200):
            if socket.closed:
                break
            await asyncio.sleep(0.05)
        # Cut off in the middle of the sending, it does not always read why.
        assert socket.close_code in (
            aiohttp.WSCloseCode.MESSAGE_TOO_BIG,
            aiohttp.WSCloseCode.ABNORMAL_CLOSURE,
        )

    attack(send)


# ------------------------------------------------------------------------------------------- intents
def test_a_flood_of_intents_is_held_back_and_then_ended(attack: Any, last_word: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        await hostile.work()
        before, rounds = _events(besieged), besieged.closed()
        started = time.monotonic()
        for n in range(2000):
            body = WorkFailed(client=hostile.key, assignment=f"{n}-{n + 10_000}", reason="flood")
            with contextlib.suppress(ConnectionError, aiohttp.ClientError, RuntimeError, AssertionError):
                await hostile.say(encode(Intent(id=f"flood-{n}", body=body)))
        assert "a flood of messages" in await last_word(hostile)
        assert time.monotonic() - started > 1  # some of it had to wait
        events = _events(besieged) - before
        assert events < 50 + 10 * (besieged.closed() - rounds)  # what changes nothing makes no event

    attack(send)


def _events(besieged: Any) -> int:
    """How many the run's log has."""
    database = besieged.place / "server" / "server" / "manyhands.db"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return int(connection.execute("select max(sequence) from events").fetchone()[0])


def test_nobody_speaks_for_another(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        await hostile.work()
        ref = BlobRef(blob="ab" * 32, size_bytes=1000)
        for body, fault in (
            (Ready(client=besieged.honest[0], round=0), "cannot speak for"),
            (Left(client=besieged.honest[0], how="left"), "cannot speak for"),
            (WorkFailed(client=besieged.honest[0], assignment="0-0", reason="x"), "cannot speak for"),
            (Fingerprinted(client=besieged.honest[0], round=0, fingerprint="0" * 64), "cannot speak for"),
            (Verdict(by=besieged.honest[0], round=0, assignment="0-0", accepted=False), "cannot speak for"),
            (Left(client=hostile.key, how="kicked"), "not be 'kicked' by itself"),
            (SnapshotOffer(round=0, blob=ref), "nobody has asked this client"),
            (
                SnapshotStored(
                    by=hostile.key, snapshot=Snapshot(round=10**6, blob=ref, fingerprint="0" * 64)
                ),
                "nobody has asked this client",
            ),
            (WorkFailed(client=hostile.key, assignment="0-0", reason="x" * 501), "at most 500"),
        ):
            with pytest.raises(Refused, match=fault):
                await hostile.connection.ask(body)

    attack(send)


def test_a_verdict_of_a_stars_client_means_nothing(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, claims = hostile.honest_update(work)
        for other in range(4):
            ordinal = int(work.assignment.id.partition("-")[2]) - 2 + other
            verdict = Verdict(
                by=hostile.key,
                round=work.assignment.round,
                assignment=f"{work.assignment.round}-{ordinal}",
                accepted=False,
                reason="I do not like it",
            )
            await hostile.connection.ask(verdict)
        await hostile.contribute(work, path, claims)
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert row["counted"]

    attack(send)


def test_a_false_fingerprint_hurts_its_sender_alone(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        work = await hostile.work()
        lie = Fingerprinted(client=hostile.key, round=work.assignment.round - 1, fingerprint="0" * 64)
        await hostile.connection.ask(lie)
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert not row["counted"]
        assert "differed from what was agreed" in row["reason"]

    attack(send)


# ------------------------------------------------------------------------------------------- blobs
def test_an_upload_that_was_not_announced_is_refused(attack: Any, tmp_path: Any) -> None:
    async def send(hostile: Any) -> None:
        path = tmp_path / "x"
        path.write_bytes(b"anything")
        manifest = manifest_of(path)
        blob = f"/blobs/{manifest.blob}"
        for method, rest, body in (
            ("PUT", "", manifest.to_json()),
            ("PUT", "/chunks/0", b"anything"),
            ("POST", "/complete", None),
        ):
            status, text = await hostile.request(method, blob + rest, body)
            assert status == 403
            assert "was not announced" in text

    attack(send)


def test_another_clients_update_is_not_to_be_read(attack: Any, besieged: Any) -> None:
    async def send(hostile: Any) -> None:
        await hostile.work()
        rows = await asyncio.to_thread(besieged.get, "/api/runs/run/ledger")
        theirs = rows[-1]["closing"]["counted"][0]["update"]["blob"]
        for rest in ("/manifest", "/chunks/0"):
            status, text = await hostile.request("GET", f"/blobs/{theirs}{rest}")
            assert status == 403
            assert "is not open to this client" in text
        first = hostile.descriptor.first_snapshot.blob
        assert (await hostile.request("GET", f"/blobs/{first}/manifest"))[0] == 200

    attack(send)


@pytest.mark.parametrize("token", ["", "Bearer", "Bearer " + "0" * 64, "Basic " + "0" * 64, "Bearer \xe4"])
def test_a_wrong_token_opens_nothing(attack: Any, token: str) -> None:
    async def send(hostile: Any) -> None:
        first = hostile.descriptor.first_snapshot.blob
        for method, rest in (("GET", "/manifest"), ("GET", "/chunks/0"), ("PUT", ""), ("POST", "/complete")):
            status, text = await hostile.request(method, f"/blobs/{first}{rest}", token=token)
            assert status == 401
            assert "sign in first" in text

    attack(send)


@pytest.mark.parametrize("blob", ["..%2f..%2fetc%2fpasswd", "0" * 63, "A" * 64, "%00"])
def test_addresses_are_blob_ids_and_nothing_else(attack: Any, blob: str) -> None:
    async def send(hostile: Any) -> None:
        status, _ = await hostile.request("GET", f"/blobs/{blob}/manifest")
        assert status in (400, 404)

    attack(send)


# ------------------------------------------------------------------------------------------- slowness
def test_slow_bodies_keep_nobody_else_out(attack: Any, besieged: Any) -> None:
    """MAX_BODIES of them at a time; the next one is refused, and the honest client goes on uploading meanwhile."""

    async def send(hostile: Any) -> None:
        work = await hostile.work()
        path, _ = hostile.honest_update(work)
        manifest = manifest_of(path)
        _, nonce = await hostile.commit(work, manifest.ref)
        await hostile.open(work, manifest.ref, nonce)
        assert (await hostile.request("PUT", f"/blobs/{manifest.blob}", manifest.to_json()))[0] == 200
        chunk, size = f"/blobs/{manifest.blob}/chunks/0", path.stat().st_size
        slow = [await hostile.declare(chunk, size, b"x") for _ in range(MAX_BODIES)]
        await asyncio.sleep(0.2)
        reader, writer = await hostile.declare(chunk, size, b"x")
        assert b"429" in await reader.readline()
        writer.close()
        await hostile.say("I have nothing more to say")  # ends the session, not the connections
        row = await asyncio.to_thread(besieged.work_of, work.assignment.round, hostile.key)
        assert not row["counted"]
        await asyncio.to_thread(besieged.check_it_goes_on)
        for _, writer in slow:
            assert not writer.is_closing()
            writer.close()

    attack(send)


def test_who_does_not_sign_in_makes_room(attack: Any, besieged: Any) -> None:
    async def send(_: Any) -> None:
        async with aiohttp.ClientSession() as http:
            url = f"http://{besieged.address}/connect"
            silent = [await http.ws_connect(url) for _ in range(MAX_SIGNING_IN + 5)]
            refused = [await asyncio.wait_for(s.receive(), 5) for s in silent[:5]]
            for message in refused:
                assert "the sign-in took too long" in message.data
            other = ephemeral()
            async with _signing_in(http, url, other) as (socket, _, challenge, hello):
                await socket.send_str(encode(answer(other, hello, challenge)))
                welcome = json.loads((await socket.receive()).data)
                assert welcome["type"] == "welcome"
                left = Left(client=other.public, how="left", reason="bye")
                await socket.send_str(encode(Intent(id="a", body=left)))
                await asyncio.sleep(0.2)
            for s in silent:
                await s.close()

    attack(send)


@asynccontextmanager
async def _signing_in(
    http: aiohttp.ClientSession, url: str, identity: Any, hello: Hello | None = None
) -> AsyncIterator[tuple[Any, Any, Challenge, Hello]]:
    hello = hello or Hello(
        versions=(1,), run_id="run", client=identity.public, nonce=new_nonce(), boot="ab" * 16, label="y"
    )
    async with http.ws_connect(url) as socket:
        await socket.send_str(encode(hello))
        challenge = from_server((await socket.receive()).data)
        assert isinstance(challenge, Challenge)
        yield socket, identity, challenge, hello


def test_a_proof_that_was_overheard_is_worth_nothing(attack: Any, besieged: Any) -> None:
    async def send(_: Any) -> None:
        identity, url = ephemeral(), f"http://{besieged.address}/connect"
        async with aiohttp.ClientSession() as http:
            async with _signing_in(http, url, identity) as (_, _, challenge, hello):
                overheard = answer(identity, hello, challenge)
            async with _signing_in(http, url, identity, hello) as (socket, _, _, _):
                await socket.send_str(encode(overheard))
                rejected = json.loads((await socket.receive()).data)
                assert (rejected["type"], rejected["final"]) == ("rejected", True)
                assert "could not prove" in rejected["reason"]

    attack(send)


def test_connections_without_a_request_are_closed(attack: Any, besieged: Any) -> None:
    """Also those that never finish their headers, however much of them they send."""

    async def endless() -> int:
        _, writer = await asyncio.open_connection("127.0.0.1", besieged.port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 100 * MAX_HEADERS_BYTES:
                writer.write(b"x" * 4096)
                await writer.drain()
                sent += 4096
                await asyncio.sleep(0)
        writer.close()
        return sent

    async def idle(first_words: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", besieged.port)
        writer.write(first_words)
        end = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        return end

    async def send(_: Any) -> None:
        assert await endless() < 100 * MAX_HEADERS_BYTES
        started = time.monotonic()
        assert (
            await asyncio.gather(idle(b""), idle(b"GET / HT"), idle(b"GET / HTTP/1.1\r\nHost: x\r\n"))
            == [b""] * 3
        )
        assert 5 < time.monotonic() - started < 20

    attack(send)


def test_an_old_update_under_a_new_size_is_refused(attack: Any, reason_of: Any, besieged: Any) -> None:
    """The blob of an earlier round is there: who announces it with another size is told so."""

    async def send(hostile: Any) -> None:
        first = await hostile.work()
        path, claims = hostile.honest_update(first)
        old = await hostile.contribute(first, path, claims)
        await asyncio.to_thread(besieged.work_of, first.assignment.round, hostile.key)
        work = await hostile.work()
        lie = replace(old.update, size_bytes=old.update.size_bytes - 8)
        _, nonce = await hostile.commit(work, lie)
        with pytest.raises(Refused, match=rf"has {old.update.size_bytes} bytes, not"):
            await hostile.open(work, lie, nonce)
        assert "bytes, not" in await reason_of(hostile, work)

    attack(send)
