"""A client's session with the server: sign-in, deliveries out, intents in.

One WebSocket each. A session is admitted by the coordinator's rules (`may_join`). One that comes back as the same
boot goes on after the last delivery that it has handled, even if the run was finished meanwhile; where it has
handled none, or the log has them no more, it is told the situation anew. Neither is an event; any other boot joins.
The token that the sign-in yields opens the blob routes, for this run and as long as the session lives.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

from fastapi import WebSocket, WebSocketDisconnect

from manyhands.coordination.effects import CatchUp, Closed, Dismissed
from manyhands.coordination.events import Joined
from manyhands.coordination.membership import may_join
from manyhands.coordination.newcomers import catch_up
from manyhands.coordination.situations import situation
from manyhands.errors import ManyhandsError, ProtocolError, Refused, StorageError, UpdateError
from manyhands.identity.canonical import sign_document
from manyhands.identity.keys import Identity
from manyhands.network import messages
from manyhands.network.messages import (
    PUBLISHED_DOMAIN,
    Ack,
    Deliver,
    Goodbye,
    Heartbeat,
    Hello,
    Intent,
    Proof,
    Rejected,
    Welcome,
)
from manyhands.network.sign_in import challenge, check_proof
from manyhands.node.server.intents import carry_out, give_up
from manyhands.node.server.run_driver import Delivery, Mailbox, clock_ms
from manyhands.node.server.served_run import ServedRun
from manyhands.node.server.signed_in import Session, Sessions

SITUATION = 1 << 30
"""Deliveries (sequence, SITUATION + k) tell the situation after that event; the last of them is SITUATION_END. Who
has seen that one has seen all of it; who was cut off before is told again."""
SITUATION_END = (1 << 31) - 1

log = logging.getLogger(__name__)


async def serve_client(
    socket: WebSocket, runs: dict[str, ServedRun], sessions: Sessions, identity: Identity
) -> None:
    """Everything that happens on one WebSocket, from its acceptance to its end."""
    await socket.accept()
    try:
        async with sessions.signing_in.one():
            hello, run = await _sign_in(socket, runs, identity)
        session, mailbox, backlog, welcome = await _admit(socket, hello, run, sessions)
    except Refused as error:
        final = not isinstance(error, TryAgain)
        finished = isinstance(error, NothingToDo)
        await _close(socket, Rejected(reason=str(error), final=final, finished=finished))
        return
    except ProtocolError as error:
        await _close(socket, Rejected(reason=str(error), final=True))
        return
    except TimeoutError:
        await _close(socket, Rejected(reason="the sign-in took too long", final=False))
        return
    except WebSocketDisconnect:
        return
    try:
        await socket.send_text(messages.encode(welcome))
        await _first_to_end(
            asyncio.create_task(_send(session, mailbox, backlog, identity)),
            asyncio.create_task(_receive(session)),
        )
    except (WebSocketDisconnect, RuntimeError):
        pass  # RuntimeError: starlette's word for sending to a closed socket
    except StorageError as error:
        await _close(socket, Goodbye(reason=str(error), final=False))
    finally:
        run.driver.unsubscribe(mailbox)
        if sessions.remove(session):
            run.driver.silent(session.client)


async def _first_to_end(*tasks: asyncio.Task[None]) -> None:
    """Run until one ends, end the others, and raise what it raised."""
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


class TryAgain(Refused):
    """Refused as things stand; later may be different."""


class NothingToDo(Refused):
    """The run is finished."""


async def _sign_in(
    socket: WebSocket, runs: dict[str, ServedRun], identity: Identity
) -> tuple[Hello, ServedRun]:
    hello = messages.from_client(await _text(socket))
    if not isinstance(hello, Hello):
        raise ProtocolError(f"expected 'hello' first, got '{hello.type}'")
    sent = challenge(identity, hello)
    await socket.send_text(messages.encode(sent))
    proof = messages.from_client(await _text(socket))
    if not isinstance(proof, Proof):
        raise ProtocolError(f"expected 'proof', got '{proof.type}'")
    check_proof(hello, sent, proof)
    run = runs.get(hello.run_id)
    if run is None:
        there = ", ".join(sorted(runs)) or "none"
        raise Refused(f"there is no run '{hello.run_id}' on this server; its runs: {there}")
    if hello.plan_hash is not None and hello.plan_hash != run.descriptor.plan_hash:
        raise Refused(
            f"run '{hello.run_id}' has plan {run.descriptor.plan_hash[:16]}..., but this client has worked on "
            f"{hello.plan_hash[:16]}... under that name. Look at the new plan with `manyhands server status`, "
            "then move the client's directory of the run away to take part again."
        )
    return hello, run


async def _text(socket: WebSocket) -> str:
    """The next message. Raises ProtocolError for a binary one, WebSocketDisconnect at the end."""
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006), message.get("reason"))
    text = message.get("text")
    if text is None:
        raise ProtocolError("a binary message; messages are JSON text, and payloads travel as blobs")
    return str(text)


async def _admit(
    socket: WebSocket, hello: Hello, run: ServedRun, sessions: Sessions
) -> tuple[Session, Mailbox, list[Delivery], Welcome]:
    """Let a client in, or raise Refused; whoever calls ends the session. With what the client is to hear first."""
    driver, key = run.driver, hello.client
    if not _goes_on(run, hello):
        _check_may_join(run, hello)
    old = sessions.by_client.get((run.run_id, key))
    if old is not None:
        await _close(old.socket, Goodbye(reason="this client has connected again", final=False))
        sessions.remove(old)
    session = Session(
        client=key,
        boot=hello.boot,
        token=secrets.token_hex(32),
        run=run,
        socket=socket,
        last_heard_ms=clock_ms(),
    )
    mailbox = driver.subscribe(key, is_client=True)
    try:
        backlog, resumed = await _first_deliveries(hello, run, mailbox)
    except (StorageError, Refused) as error:
        driver.unsubscribe(mailbox)
        raise TryAgain(str(error)) from error
    except asyncio.CancelledError:
        driver.unsubscribe(mailbox)
        raise
    sessions.add(session)
    driver.heard(key)
    welcome = Welcome(
        token=session.token,
        descriptor=run.descriptor_text,
        signature=run.descriptor_signature,
        heartbeat_s=min(0.5, run.descriptor.plan.rounds.suspected_after_s / 4),
        resumed=resumed,
    )
    return session, mailbox, backlog, welcome


def _check_may_join(run: ServedRun, hello: Hello) -> None:
    """Raises Refused, as TryAgain where that may help."""
    state = run.driver.state
    refusal = may_join(state, hello.client, hello.boot)
    if refusal is None:
        return
    if state.phase == "finished":
        raise NothingToDo(refusal)
    known, membership = state.clients.get(hello.client), state.plan.membership
    removed = known is not None and known.status == "kicked"
    stranger = membership.kind == "allow_list" and hello.client not in membership.allow
    raise (Refused if removed or stranger or state.phase == "failed" else TryAgain)(refusal)


def _goes_on(run: ServedRun, hello: Hello) -> bool:
    """Whether this is the session that the coordinator knows, on another connection."""
    known = run.driver.state.clients.get(hello.client)
    return known is not None and known.boot == hello.boot and known.status in ("catching_up", "ready")


async def _first_deliveries(hello: Hello, run: ServedRun, mailbox: Mailbox) -> tuple[list[Delivery], bool]:
    """What to send before the mailbox, and whether that goes on after `hello.seen`.

    The mailbox was opened before, so that nothing falls between. Raises Refused, StorageError.
    """
    driver = run.driver
    if _goes_on(run, hello):
        if hello.seen is not None and not SITUATION <= hello.seen[1] < SITUATION_END:
            try:
                return await driver.missed(hello.client, hello.seen), True
            except StorageError as error:
                log.info("%s is told the situation anew: %s", hello.client[:8], error)
        return _situation(hello, run), False
    joined = Joined(client=hello.client, boot=hello.boot, label=hello.label, has_round=hello.has_round)
    sequence = await driver.submit(joined)
    if not _goes_on(run, hello):
        raise Refused("another process with this key was faster")
    waiting = [mailbox.queue.get_nowait() for _ in range(mailbox.queue.qsize())]
    return [d for d in waiting if d is not None and d.sequence >= sequence], False


def _situation(hello: Hello, run: ServedRun) -> list[Delivery]:
    """All that the client needs to know now; what the state says of its public is corrected by what it says."""
    state = run.driver.state
    bodies = [
        catch_up(state, hello.has_round) if isinstance(body, CatchUp) else body
        for body in situation(state, hello.client)
    ]
    numbers = [*range(SITUATION, SITUATION + len(bodies) - 1), SITUATION_END]
    return [Delivery(sequence=state.sequence, n=n, body=b) for n, b in zip(numbers, bodies, strict=True)]


async def _send(session: Session, mailbox: Mailbox, backlog: list[Delivery], identity: Identity) -> None:
    """What was missed, then what comes; ends with the mailbox, or when the client is put out for good."""
    last = (-1, -1)
    for delivery in backlog:
        last = (delivery.sequence, delivery.n)
        await _deliver(session, delivery, identity)
    while (next_one := await mailbox.get()) is not None:
        if (next_one.sequence, next_one.n) <= last:
            continue
        await _deliver(session, next_one, identity)
        if isinstance(next_one.body, Dismissed) and next_one.body.final:
            await _close(session.socket, Goodbye(reason=next_one.body.reason, final=True))
            return
    await _close(session.socket, Goodbye(reason="the server is going down", final=False))


async def _deliver(session: Session, delivery: Delivery, identity: Identity) -> None:
    message = _message(delivery, session.run.run_id, identity)
    await session.socket.send_text(messages.encode(message))


def _message(delivery: Delivery, run_id: str, identity: Identity) -> Deliver:
    body, signature = delivery.body, ""
    if isinstance(body, Closed | CatchUp):
        signature = sign_document(identity, PUBLISHED_DOMAIN, messages.published(run_id, body))
    return Deliver(id=(delivery.sequence, delivery.n), body=body, signature=signature)


async def _receive(session: Session) -> None:
    driver = session.run.driver
    try:
        while True:
            message = messages.from_client(await _text(session.socket))
            await session.rate.admit()
            session.last_heard_ms = clock_ms()
            driver.heard(session.client)
            if isinstance(message, Heartbeat):
                session.progress = message.progress
            elif isinstance(message, Intent):
                await _carry_out(session, message)
            else:
                raise ProtocolError(f"'{message.type}' is not expected after the sign-in")
    except ProtocolError as error:
        log.warning("the session of %s ends: %s", session.client[:8], error)
        await give_up(session, f"its session was ended: {error}")
        await _close(session.socket, Goodbye(reason=str(error), final=True))


async def _carry_out(session: Session, intent: Intent) -> None:
    started = time.monotonic()
    try:
        await carry_out(session, intent.body)
        answer = Ack(id=intent.id)
    except (Refused, UpdateError, ManyhandsError) as error:
        if isinstance(error, StorageError):
            raise
        log.warning("intent %s of %s refused: %s", intent.body.kind, session.client[:8], error)
        answer = Ack(id=intent.id, error=str(error))
    log.debug("intent %s took %.1f ms", intent.body.kind, 1e3 * (time.monotonic() - started))
    await session.socket.send_text(messages.encode(answer))


async def _close(socket: WebSocket, last_word: Rejected | Goodbye) -> None:
    """Say why, then close; the other side may be gone already."""
    try:
        await socket.send_text(messages.encode(last_word))
        await socket.close()
    except (WebSocketDisconnect, RuntimeError):
        pass
