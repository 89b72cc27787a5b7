"""The bounds at the door, one by one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from manyhands.coordination.types import BlobRef
from manyhands.errors import ProtocolError, UpdateError
from manyhands.network.blobs.manifest import CHUNK_BYTES
from manyhands.node.server import limits
from manyhands.node.server.limits import (
    MAX_ANNOUNCED,
    MAX_BODIES,
    Announced,
    Bodies,
    MessageRate,
    SigningIn,
    TokenBucket,
    bearer_token,
    declared_bytes,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


# ------------------------------------------------------------------------------------------- messages
def test_a_bucket_gives_its_burst_at_once_and_then_its_rate() -> None:
    clock = Clock()
    bucket = TokenBucket(10.0, 5, clock)

    assert [bucket.take() for _ in range(5)] == [0.0] * 5
    assert bucket.take() == pytest.approx(0.1)
    assert bucket.take() == pytest.approx(0.2)
    clock.now += 0.3
    assert bucket.take() == pytest.approx(0.0)
    clock.now += 1000
    assert [bucket.take() for _ in range(5)] == [0.0] * 5
    assert bucket.take() > 0  # a long silence saves up no more than the burst


def test_a_flood_waits_and_then_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MESSAGES_PER_S", 1000.0)
    monkeypatch.setattr(limits, "MESSAGE_BURST", 10)
    monkeypatch.setattr(limits, "MAX_HELD_BACK", 20)

    async def flood(rate: MessageRate) -> None:
        for _ in range(1000):
            rate._bucket.take()  # faster than they are handled
            await rate.admit()

    async def test() -> None:
        rate, loop = MessageRate(), asyncio.get_running_loop()
        started = loop.time()
        for _ in range(10):
            await rate.admit()
        assert loop.time() - started < 0.005
        with pytest.raises(ProtocolError, match="a flood of messages: more than 1000 in a second"):
            await flood(rate)
        assert loop.time() - started >= 0.02

    asyncio.run(test())


def test_a_pause_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MESSAGES_PER_S", 200.0)
    monkeypatch.setattr(limits, "MESSAGE_BURST", 1)
    monkeypatch.setattr(limits, "MAX_HELD_BACK", 3)

    async def test() -> None:
        rate = MessageRate()
        for _ in range(5):
            await rate.admit()
            await rate.admit()
            await rate.admit()
            await asyncio.sleep(0.02)

    asyncio.run(test())


# ------------------------------------------------------------------------------------------- sign-in
def test_whoever_has_stood_longest_at_the_door_makes_room() -> None:
    async def test() -> None:
        door, entered = SigningIn(most=2, timeout_s=5.0), []

        async def stand(name: str) -> str:
            try:
                async with door.one():
                    entered.append(name)
                    await asyncio.sleep(30)
            except TimeoutError:
                return name
            raise AssertionError("nobody sleeps so long")

        standing = [asyncio.create_task(stand(name)) for name in "ab"]
        await asyncio.sleep(0.01)
        async with door.one():
            await asyncio.sleep(0.01)
            assert standing[0].done()
            assert standing[0].result() == "a"
            assert not standing[1].done()
        for task in standing:
            task.cancel()
        await asyncio.gather(*standing, return_exceptions=True)
        assert entered == ["a", "b"]
        assert not door._open

    asyncio.run(test())


def test_nobody_stands_there_for_ever() -> None:
    async def test() -> None:
        door = SigningIn(timeout_s=0.01)
        with pytest.raises(TimeoutError):
            async with door.one():
                await asyncio.sleep(5)

    asyncio.run(test())


# ------------------------------------------------------------------------------------------- uploads
def ref(n: int, size: int = 1000) -> BlobRef:
    return BlobRef(blob=f"{n:064x}", size_bytes=size)


def test_what_is_announced_may_be_uploaded_until_it_is_done() -> None:
    announced = Announced()
    announced.add(ref(1))

    assert announced.size_of(ref(1).blob) == 1000
    assert announced.size_of(ref(2).blob) is None
    announced.done(ref(1).blob)
    announced.done(ref(1).blob)
    assert announced.size_of(ref(1).blob) is None


def test_the_oldest_announcement_makes_room() -> None:
    announced = Announced()
    for n in range(MAX_ANNOUNCED + 1):
        announced.add(ref(n))

    assert announced.size_of(ref(0).blob) is None
    assert all(announced.size_of(ref(n).blob) for n in range(1, MAX_ANNOUNCED + 1))


def test_announcing_again_gives_no_new_allowance_and_no_new_size() -> None:
    announced = Announced()
    announced.add(ref(1))
    assert announced.spend(ref(1).blob, 3 * 1000 + 4 * CHUNK_BYTES)
    announced.add(ref(1))
    assert not announced.spend(ref(1).blob, 1)
    with pytest.raises(UpdateError, match="announced with 1000 bytes, now with 999"):
        announced.add(ref(1, 999))


def test_a_whole_upload_with_some_repeats_is_within_the_allowance() -> None:
    announced, size = Announced(), 500 * 1024 * 1024
    announced.add(ref(1, size))
    chunks = size // CHUNK_BYTES

    assert all(announced.spend(ref(1).blob, CHUNK_BYTES) for _ in range(2 * chunks))


def test_requests_without_a_body_cost_something_too() -> None:
    announced = Announced()
    announced.add(ref(1, 0))

    assert not all(announced.spend(ref(1).blob, 0) for _ in range(4 * CHUNK_BYTES // 1024 + 1))


@pytest.mark.parametrize(
    ("headers", "size"),
    [
        ({"content-length": "12"}, 12),
        ({"content-length": "9" * 400}, int("9" * 20)),
        ({"content-length": "-1", "transfer-encoding": "chunked"}, CHUNK_BYTES),
        ({"transfer-encoding": "chunked"}, CHUNK_BYTES),
        ({}, 0),
    ],
)
def test_the_length_of_a_body_as_it_is_declared(headers: dict[str, str], size: int) -> None:
    assert declared_bytes(headers) == size


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer abc", "abc"), ("bearer abc", "abc"), ("Basic abc", ""), ("", ""), ("Bearer", "")],
)
def test_tokens(header: str, token: str) -> None:
    assert bearer_token(header) == token


def test_one_sender_has_so_many_bodies_under_way_and_no_more() -> None:
    async def test() -> None:
        release, inside = asyncio.Event(), 0

        async def app(scope: Any, receive: Any, send: Any) -> None:
            nonlocal inside
            del scope, receive, send
            inside += 1
            await release.wait()

        bodies = Bodies(app, known={"one", "two"}.__contains__)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        def request(token: str, method: str = "PUT") -> asyncio.Task[None]:
            scope = {
                "type": "http",
                "method": method,
                "headers": [(b"authorization", f"Bearer {token}".encode())],
            }
            return asyncio.create_task(bodies(scope, None, send))  # type: ignore[arg-type]

        mine = [request("one") for _ in range(MAX_BODIES + 3)]
        others = [request("two"), request("one", "GET"), request("nobody")]
        await asyncio.sleep(0.01)
        assert inside == MAX_BODIES + 3
        assert [m["status"] for m in sent if m["type"] == "http.response.start"] == [429] * 3
        release.set()
        await asyncio.gather(*mine, *others)
        assert not bodies._under_way
        await request("one")
        assert inside == MAX_BODIES + 4

    asyncio.run(test())
