"""What an agent answers is not trusted: frames that are none end the connection, in words."""

from __future__ import annotations

import asyncio

import pytest

from manyhands.errors import ProtocolError
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
        found = [(answer.fields, bytes(answer.body)) async for answer in there.stream("read")]
        assert found == [({"size": 3, "more": True}, b"abc"), ({"done": True}, b"")]

    asyncio.run(ask())
