"""What an agent answers is not trusted: frames that are none end the connection, in words."""

from __future__ import annotations

import asyncio

import pytest

from manyhands.errors import ProtocolError, ServerUnreachable
from manyhands.hosts.agent import Agent
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.on_host.files import CHUNK
from manyhands.hosts.on_host.frames import MARK


class _Silent:
    """A channel of a host that reads and says nothing by itself."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def read_on(self, on: bool) -> None: ...

    def close(self) -> None:
        self.closed = True


def silent() -> tuple[Agent, _Silent]:
    there, channel = Agent(Host(host_name="server1")), _Silent()
    there._channel = channel
    there.received(b"hello" + MARK)
    return there, channel


@pytest.mark.parametrize(
    "frame",
    [
        b'{"size": -5}',
        b'{"size": %d}' % (CHUNK + 1),
        b'{"size": true}',
        b'{"size": "1"}',
        b"[]",
        b"7",
        b"\xff",
        b"[" * 99_999,
    ],
)
def test_what_is_no_frame_ends_the_connection(frame: bytes) -> None:
    async def ask() -> None:
        there, channel = silent()
        there.received(frame + b"\n")
        assert channel.closed
        with pytest.raises(ProtocolError, match=r"server1: the host answered .*, which is no frame"):
            await there.ask("probe")

    asyncio.run(ask())


def test_frames_come_in_any_pieces() -> None:
    async def ask() -> None:
        there, _ = silent()
        for byte in b'{"size": 3, "more": true}\nabc{"done": true}\n':
            there.received(bytes([byte]))
        found = [(answer.fields, bytes(answer.body)) async for answer in there.stream("read", silence_s=5)]
        assert found == [({"size": 3, "more": True}, b"abc"), ({"done": True}, b"")]

    asyncio.run(ask())


def test_a_host_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        there, channel = silent()
        with pytest.raises(ServerUnreachable, match=r"server1 has said nothing for 0 s \(probe\)"):
            await there.ask("probe")
        assert channel.closed
        with pytest.raises(ServerUnreachable, match="the connection was lost"):  # not the answer to the first
            await there.ask("probe")

    monkeypatch.setattr("manyhands.hosts.agent.SILENCE_S", 0.1)
    asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_host_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        there, _ = silent()
        there.may_write(False)
        with pytest.raises(ServerUnreachable, match="has said nothing"):
            await there.ask("probe")

    monkeypatch.setattr("manyhands.hosts.agent.SILENCE_S", 0.1)
    asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_slow_line_is_no_silence() -> None:
    """However long one frame takes, as long as bytes of it come."""

    async def ask() -> None:
        there, _ = silent()

        async def drip() -> None:
            for byte in b'{"size": 8, "more": true}\n01234567{"done": true}\n':
                await asyncio.sleep(0.05)
                there.received(bytes([byte]))

        dripping = asyncio.create_task(drip())
        bodies = [bytes(answer.body) async for answer in there.stream("read", silence_s=1)]
        assert bodies == [b"01234567", b""]
        await dripping

    asyncio.run(asyncio.wait_for(ask(), 20))
