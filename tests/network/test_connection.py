"""A client's connection against a server that is scripted word by word: what is repeated, resumed, and what ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from manyhands.coordination.effects import Abandon
from manyhands.coordination.events import Ready
from manyhands.errors import ProtocolError, Refused, ServerUnreachable
from manyhands.identity.keys import ephemeral
from manyhands.network import connection as module
from manyhands.network import messages
from manyhands.network.connection import Connection, Terms
from manyhands.network.messages import (
    Ack,
    Challenge,
    Deliver,
    Goodbye,
    Heartbeat,
    Hello,
    Intent,
    Proof,
    Rejected,
    Welcome,
    encode,
    from_client,
)
from manyhands.network.sign_in import challenge, check_proof

SERVER, OTHER, CLIENT = ephemeral(), ephemeral(), ephemeral()
LONG_S = 10.0


class Line:
    """One connection, as the server sees it."""

    def __init__(self, socket: web.WebSocketResponse, hello: Hello) -> None:
        self.socket, self.hello = socket, hello

    async def say(self, message: Any) -> None:
        await self.socket.send_str(message if isinstance(message, str) else encode(message))

    async def hear(self) -> Intent:
        """The next intent; heartbeats are passed over."""
        while True:
            message = from_client((await self.socket.receive()).data)
            if not isinstance(message, Heartbeat):
                assert isinstance(message, Intent)
                return message

    async def until_closed(self) -> None:
        async for _ in self.socket:
            pass


Script = Callable[[Line], Awaitable[None]]


async def signed_in(line: Line, *, resumed: bool = False) -> None:
    sent = challenge(SERVER, line.hello)
    await line.say(sent)
    proof = from_client((await line.socket.receive()).data)
    assert isinstance(proof, Proof)
    check_proof(line.hello, sent, proof)
    await line.say(
        Welcome(token="t" * 8, descriptor="{}", signature="0" * 128, heartbeat_s=0.02, resumed=resumed)
    )


@asynccontextmanager
async def serving(*scripts: Script) -> AsyncIterator[tuple[str, list[Hello]]]:
    """A server whose n-th connection follows the n-th script, the last one for all that come after."""
    hellos: list[Hello] = []

    async def connect(request: web.Request) -> web.WebSocketResponse:
        made = web.WebSocketResponse()
        await made.prepare(request)
        hello = from_client((await made.receive()).data)
        assert isinstance(hello, Hello)
        script = scripts[min(len(hellos), len(scripts) - 1)]
        hellos.append(hello)
        with contextlib.suppress(ConnectionError, aiohttp.ClientError, TypeError):
            await script(Line(made, hello))
        return made

    app = web.Application()
    app.router.add_get("/connect", connect)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    await web.SockSite(runner, listening).start()
    try:
        yield f"127.0.0.1:{listening.getsockname()[1]}", hellos
    finally:
        await runner.cleanup()


@asynccontextmanager
async def connecting(address: str, **options: Any) -> AsyncIterator[tuple[Connection, list[tuple[str, str]]]]:
    said: list[tuple[str, str]] = []

    def check_server(key: str) -> None:
        if key != SERVER.public:
            raise Refused("this is another server's key")

    terms = Terms(address=address, run_id="run", identity=CLIENT, label="me", check_server=check_server)
    made = Connection(terms=terms, on_state=lambda state, text: said.append((state, text)), **options)
    try:
        async with asyncio.timeout(LONG_S):
            yield made, said
    finally:
        await made.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await test()

    asyncio.run(whole())


def delivery(n: int) -> Deliver:
    return Deliver(id=(n, 0), body=Abandon(round=0, assignment=f"0-{n}", reason="r"))


async def drain(connection: Connection, into: list[Deliver]) -> None:
    async for delivered in connection.deliveries():
        into.append(delivered)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.02)
    monkeypatch.setattr(module, "LONGEST_WAIT_S", 0.05)


READY = Ready(client=CLIENT.public, round=0)


def test_deliveries_come_once_and_an_intent_is_acknowledged() -> None:
    async def script(line: Line) -> None:
        await signed_in(line)
        for n in (1, 2, 2, 1, 3):
            await line.say(delivery(n))
        intent = await line.hear()
        await line.say(Ack(id=intent.id))
        await line.say(delivery(4))
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, said):
            got: list[Deliver] = []
            draining = asyncio.create_task(drain(connection, got))
            await connection.until_connected()
            await connection.ask(READY)
            while len(got) < 4:
                await asyncio.sleep(0.01)
            assert [d.id for d in got] == [(1, 0), (2, 0), (3, 0), (4, 0)]
            assert connection.server == SERVER.public
            assert connection.holder.headers == {"Authorization": "Bearer " + "t" * 8}
            assert said[0][0] == "connected"
            draining.cancel()

    run(test)


def test_what_was_not_acknowledged_is_repeated_under_its_id_and_deliveries_go_on() -> None:
    heard: list[Intent] = []

    async def cut(line: Line) -> None:
        await signed_in(line)
        await line.say(delivery(1))
        heard.append(await line.hear())  # and gone before it answers
        await line.socket.close()

    async def back(line: Line) -> None:
        await signed_in(line, resumed=True)
        heard.append(await line.hear())
        await line.say(Ack(id=heard[-1].id))
        await line.say(delivery(1))
        await line.say(delivery(2))
        await line.until_closed()

    async def test() -> None:
        async with serving(cut, back) as (address, hellos), connecting(address) as (connection, said):
            got: list[Deliver] = []
            draining = asyncio.create_task(drain(connection, got))
            await connection.until_connected()
            await connection.ask(READY)
            while len(got) < 2:
                await asyncio.sleep(0.01)
            assert heard[0] == heard[1]
            assert [d.id for d in got] == [(1, 0), (2, 0)]
            assert [h.seen for h in hellos] == [None, (1, 0)]
            assert hellos[0].boot == hellos[1].boot
            assert hellos[0].nonce != hellos[1].nonce
            assert [state for state, _ in said] == ["connected", "disconnected", "connected"]
            draining.cancel()

    run(test)


def test_a_server_that_cannot_resume_starts_the_count_again() -> None:
    async def first(line: Line) -> None:
        await signed_in(line)
        await line.say(delivery(7))
        await line.say(Goodbye(reason="going down", final=False))

    async def restored(line: Line) -> None:
        await signed_in(line, resumed=False)
        await line.say(delivery(3))
        await line.until_closed()

    async def test() -> None:
        async with serving(first, restored) as (address, hellos), connecting(address) as (connection, said):
            got: list[Deliver] = []
            draining = asyncio.create_task(drain(connection, got))
            while len(got) < 2:
                await asyncio.sleep(0.01)
            assert [d.id for d in got] == [(7, 0), (3, 0)]
            assert hellos[1].seen == (7, 0)
            assert any(state == "waiting" and "going down" in text for state, text in said)
            draining.cancel()

    run(test)


def test_a_refused_intent_is_an_error_of_its_own() -> None:
    async def script(line: Line) -> None:
        await signed_in(line)
        first, second = await line.hear(), await line.hear()
        await line.say(Ack(id="nobody-asked"))
        await line.say(Ack(id=second.id))
        await line.say(Ack(id=first.id, error="not yours"))
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            draining = asyncio.create_task(drain(connection, []))
            await connection.until_connected()
            answers = await asyncio.gather(
                connection.ask(READY), connection.ask(READY), return_exceptions=True
            )
            assert isinstance(answers[0], Refused)
            assert str(answers[0]) == "not yours"
            assert answers[1] is None
            assert not connection._waiting
            draining.cancel()

    run(test)


def test_starting_over_is_another_boot_and_drops_what_the_old_one_asked() -> None:
    async def old(line: Line) -> None:
        await signed_in(line)
        await line.hear()
        await line.until_closed()

    async def new(line: Line) -> None:
        await signed_in(line)
        await line.say(delivery(9))
        await line.until_closed()

    async def test() -> None:
        async with serving(old, new) as (address, hellos), connecting(address) as (connection, _):
            got: list[Deliver] = []
            draining = asyncio.create_task(drain(connection, got))
            await connection.until_connected()
            asking = asyncio.create_task(connection.ask(READY))
            await asyncio.sleep(0.05)
            await connection.start_over(4)
            with pytest.raises(Refused, match="starts over"):
                await asking
            while not got:
                await asyncio.sleep(0.01)
            assert hellos[0].boot != hellos[1].boot
            assert hellos[1].seen is None
            assert hellos[1].has_round == 4
            draining.cancel()

    run(test)


@pytest.mark.parametrize(
    "last_word", [Goodbye(reason="kicked", final=True), Rejected(reason="kicked", final=True)]
)
def test_a_final_word_ends_it(last_word: Any) -> None:
    async def script(line: Line) -> None:
        await signed_in(line)
        await line.say(last_word)
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, hellos), connecting(address) as (connection, _):
            with pytest.raises(Refused, match="kicked"):
                await drain(connection, [])
            assert len(hellos) == 1

    run(test)


def test_a_door_that_is_closed_for_now_is_tried_again() -> None:
    async def full(line: Line) -> None:
        await line.say(Rejected(reason="the run is full", final=False, retry_after_s=0.03))

    async def free(line: Line) -> None:
        await signed_in(line)
        await line.say(delivery(1))
        await line.until_closed()

    async def test() -> None:
        async with serving(full, full, free) as (address, hellos), connecting(address) as (connection, said):
            got: list[Deliver] = []
            draining = asyncio.create_task(drain(connection, got))
            while not got:
                await asyncio.sleep(0.01)
            assert len(hellos) == 3
            assert [state for state, _ in said] == ["waiting", "waiting", "connected"]
            assert "the run is full" in said[0][1]
            draining.cancel()

    run(test)


def test_a_refusal_at_the_door_ends_it() -> None:
    async def script(line: Line) -> None:
        await line.say(Rejected(reason="not on the allow-list", final=True))

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            with pytest.raises(Refused, match="not on the allow-list"):
                await drain(connection, [])

    run(test)


def test_a_run_that_is_finished_is_no_error() -> None:
    async def script(line: Line) -> None:
        await line.say(Rejected(reason="run is finished", final=True, finished=True))

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            await drain(connection, [])
            assert connection.finished == "run is finished"

    run(test)


# ------------------------------------------------------------------------------------------- a server that is not it
def test_another_servers_key_is_refused_before_anything_is_signed() -> None:
    heard: list[Any] = []

    async def script(line: Line) -> None:
        await line.say(challenge(OTHER, line.hello))
        heard.append((await line.socket.receive()).type)

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            with pytest.raises(Refused, match="another server's key"):
                await drain(connection, [])
        assert heard == [aiohttp.WSMsgType.CLOSE]

    run(test)


def test_a_server_without_its_key_is_refused() -> None:
    async def script(line: Line) -> None:
        honest = challenge(OTHER, line.hello)
        await line.say(honest.model_copy(update={"server": SERVER.public}))
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            with pytest.raises(Refused, match="could not prove"):
                await drain(connection, [])

    run(test)


def test_a_challenge_from_another_connection_is_refused() -> None:
    old: list[Challenge] = []

    async def script(line: Line) -> None:
        old.append(challenge(SERVER, line.hello))
        await line.say(old[0])  # to the second one: what the first one was sent
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, _):
            async with connecting(address) as (connection, _):
                draining = asyncio.create_task(drain(connection, []))
                while not old:
                    await asyncio.sleep(0.01)
                draining.cancel()
            async with connecting(address) as (connection, _):
                with pytest.raises(Refused, match="changed what was said"):
                    await drain(connection, [])

    run(test)


@pytest.mark.parametrize(
    "nonsense",
    [
        "not json",
        '{"type": "deliver", "id": [1, 0], "body": {"kind": "teleport"}}',
        '{"type": "ack"}',
        encode(Challenge(version=1, server="0" * 64, nonce="0" * 64, signature="0" * 128)),
    ],
)
def test_nonsense_from_the_server_ends_it_with_a_clear_error(nonsense: str) -> None:
    async def script(line: Line) -> None:
        await signed_in(line)
        await line.say(nonsense)
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            with pytest.raises(ProtocolError, match="from the server"):
                await drain(connection, [])

    run(test)


@pytest.mark.parametrize(
    "early",
    [Ack(id="a"), Welcome(token="t", descriptor="", signature="0" * 128, heartbeat_s=1, resumed=False)],
)
def test_a_server_that_skips_the_challenge_is_refused(early: Any) -> None:
    async def script(line: Line) -> None:
        await line.say(early)
        await line.until_closed()

    async def test() -> None:
        async with serving(script) as (address, _), connecting(address) as (connection, _):
            with pytest.raises(ProtocolError, match="expected 'challenge'"):
                await drain(connection, [])

    run(test)


def test_a_message_larger_than_any_delivery_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_DELIVERY_BYTES", 10_000)

    async def large(line: Line) -> None:
        await signed_in(line)
        await line.say("x" * 20_000)
        await line.until_closed()

    async def small(line: Line) -> None:
        await signed_in(line)
        await line.say(Goodbye(reason="that was too much", final=True))

    async def test() -> None:
        async with serving(large, small) as (address, hellos), connecting(address) as (connection, _):
            with pytest.raises(Refused, match="that was too much"):
                await drain(connection, [])
            assert len(hellos) == 2  # the connection was dropped, and came back

    run(test)


# ------------------------------------------------------------------------------------------- no server at all
def test_nobody_there_is_an_error_at_the_first_contact() -> None:
    async def test() -> None:
        async with connecting(f"127.0.0.1:{_unused_port()}") as (connection, _):
            with pytest.raises(ServerUnreachable, match="no manyhands server answers"):
                await drain(connection, [])

    run(test)


def test_something_else_there_is_an_error_too() -> None:
    async def test() -> None:
        app = web.Application()  # no /connect
        runner = web.AppRunner(app)
        await runner.setup()
        port = _unused_port()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            async with connecting(f"127.0.0.1:{port}") as (connection, _):
                with pytest.raises(ServerUnreachable, match="404"):
                    await drain(connection, [])
        finally:
            await runner.cleanup()

    run(test)


def test_the_patient_wait() -> None:
    async def test() -> None:
        async with connecting(f"127.0.0.1:{_unused_port()}", patient=True) as (connection, said):
            draining = asyncio.create_task(drain(connection, []))
            while len(said) < 3:
                await asyncio.sleep(0.01)
            assert {state for state, _ in said} == {"disconnected"}
            assert not draining.done()
            draining.cancel()

    run(test)


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
