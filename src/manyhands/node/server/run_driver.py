"""One run's coordinator at work: the only writer of its log, and the only caller of `tick`.

Everything that happens to a run is an event submitted here. Events that arrive together are ticked one by one and
appended in one transaction (group commit); only then does anybody learn of their effects, and only then is
`submit` done. Whoever waits for deliveries holds a `Mailbox`. Heartbeats are no events: the driver watches them
and submits what follows from their absence. Whatever goes wrong in writing ends the run's service (`failed`): nobody
waits for ever for an event that will not be durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from manyhands.coordination.effects import Body
from manyhands.coordination.events import ClockPassed, Event, Left, Recovered, ServerStarted, Suspected
from manyhands.coordination.machine import NumberedEffect, initial_state, next_deadline, tick
from manyhands.coordination.presence import is_live
from manyhands.coordination.records import Record, replay
from manyhands.coordination.state import Client, RunState
from manyhands.coordination.types import EVERYONE, ClientId, Snapshot
from manyhands.errors import ManyhandsError, StorageError
from manyhands.plan.descriptor import RunDescriptor
from manyhands.storage.events import RunLog

BATCH_EVENTS = 256
SNAPSHOT_EVERY_EVENTS = 500
WATCH_S = 0.25
ALIVE_EVERY_S = 10.0
"""How far off the downtime may be that a restart sees: so often the log is told that its owner lives."""
STOP_GRACE_S = 5.0

log = logging.getLogger(__name__)


def clock_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """An effect on its way to one recipient."""

    sequence: int
    n: int
    body: Body


@dataclass(eq=False, slots=True)
class Mailbox:
    """Deliveries to one recipient, in order. Closed by the driver or by whoever holds it."""

    recipient: str
    is_client: bool
    queue: asyncio.Queue[Delivery | None] = field(default_factory=asyncio.Queue)

    async def get(self) -> Delivery | None:
        """The next delivery; None when the mailbox is closed."""
        return await self.queue.get()

    def close(self) -> None:
        self.queue.put_nowait(None)


class RunDriver:
    """Owns a run's log and state between `start` and `stop`."""

    def __init__(self, log: RunLog, owner: str) -> None:
        self._log = log
        self._owner = owner
        self._epoch = -1
        self._inbox: asyncio.Queue[tuple[Event, asyncio.Future[int]] | None] = asyncio.Queue()
        self._mailboxes: list[Mailbox] = []
        self._heard: dict[ClientId, float] = {}
        self._writing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._pending: set[asyncio.Future[int]] = set()
        self._snapshot_at = 0
        self.changed = asyncio.Condition()
        self.stopping = asyncio.Event()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.state: RunState

    # ------------------------------------------------------------------ life
    async def start(self, descriptor: RunDescriptor, first: Snapshot) -> None:
        """Take the lease, replay the log, tell the run that its server is back, and begin to work."""
        alive_ms = (await asyncio.to_thread(self._log.lease)).renewed_ms or 0
        self._epoch = await asyncio.to_thread(self._log.acquire, self._owner)
        loaded = await asyncio.to_thread(self._log.load)
        state = loaded.state or initial_state(descriptor.run_id, descriptor.plan, descriptor.samples, first)
        state, _ = replay(state, loaded.records)
        self.state = state
        self._snapshot_at = state.sequence
        self._writing = asyncio.create_task(self._write(), name=f"log of {descriptor.run_id}")
        downtime_ms = max(0, clock_ms() - max(alive_ms, state.now_ms)) if state.sequence else 0
        await self.submit(ServerStarted(downtime_ms=downtime_ms))
        now = time.monotonic()
        self._heard = dict.fromkeys(self.state.clients, now)
        self._watching = asyncio.create_task(self._watch(), name=f"watch of {descriptor.run_id}")

    async def stop(self) -> None:
        """Make durable and deliver what has been submitted, refuse the rest, close all mailboxes, free the lease."""
        self.stopping.set()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        if self._writing is not None:
            self._inbox.put_nowait(None)
            await asyncio.wait({self._writing}, timeout=STOP_GRACE_S)
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)
        self._refuse(StorageError("the server is going down"))
        for mailbox in self._mailboxes:
            mailbox.close()
        if self._epoch >= 0 and not self.failed.done():
            with contextlib.suppress(StorageError):
                await asyncio.to_thread(self._log.release, self._epoch)

    # ------------------------------------------------------------------ events in
    async def submit(self, event: Event) -> int:
        """Append an event; its sequence number, once it is durable. Raises StorageError if it will not be."""
        return await self._put(event)

    def _put(self, event: Event) -> asyncio.Future[int]:
        if self.failed.done():
            raise StorageError("the run's log cannot be written any more; see the server's log")
        if self.stopping.is_set():
            raise StorageError("the server is going down")
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._inbox.put_nowait((event, future))
        return future

    def heard(self, client: ClientId) -> None:
        """A heartbeat, or anything else, came from this client."""
        self._heard[client] = time.monotonic()
        known = self.state.clients.get(client)
        if known is not None and known.suspected and known.status in ("catching_up", "ready"):
            self._submit_later(Recovered(client=client))

    def silent(self, client: ClientId) -> None:
        """The client's connection has closed: suspect it now, rather than after its next missing heartbeat."""
        known = self.state.clients.get(client)
        if known is not None and not known.suspected and self._expected(known):
            self._submit_later(Suspected(client=client))

    def last_heard_s(self, client: ClientId) -> float | None:
        """Seconds since the client was heard, None if never by this process."""
        at = self._heard.get(client)
        return None if at is None else time.monotonic() - at

    def _submit_later(self, event: Event) -> None:
        """For what nobody waits for."""
        with contextlib.suppress(StorageError):
            self._put(event).add_done_callback(lambda done: done.cancelled() or done.exception())

    def _refuse(self, error: StorageError) -> None:
        """Let nobody wait any more for events that will not be written."""
        for future in list(self._pending):
            if not future.done():
                future.set_exception(error)

    # ------------------------------------------------------------------ effects out
    def subscribe(self, recipient: str, *, is_client: bool = False) -> Mailbox:
        """Deliveries to `recipient` from now on; clients also get those to everyone."""
        mailbox = Mailbox(recipient, is_client)
        self._mailboxes.append(mailbox)
        return mailbox

    def unsubscribe(self, mailbox: Mailbox) -> None:
        if mailbox in self._mailboxes:
            self._mailboxes.remove(mailbox)

    async def missed(self, recipient: str, seen: tuple[int, int]) -> list[Delivery]:
        """What went to a client after the delivery `seen`, from the log.

        Raises StorageError when some of it has been dropped: effects older than the last state snapshot but one are.
        """
        effects = await asyncio.to_thread(self._log.effects_after, recipient, seen)
        return [Delivery(sequence=e.sequence, n=e.n, body=e.effect.body) for e in effects]

    def records(self, after: int) -> Iterator[Record]:
        """Every event after number `after`, from the log: for a thread. It may hold more than has been shown."""
        return self._log.all_records(after)

    # ------------------------------------------------------------------ inside
    async def _write(self) -> None:
        try:
            await self._write_all()
        except Exception as error:  # noqa: BLE001 - the boundary of a task: logged, and told to whoever waits
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        log.error(
            "the log of run %s: %s",
            self._log.run_id,
            error,
            exc_info=not isinstance(error, ManyhandsError),
        )
        if not self.failed.done():
            self.failed.set_exception(error)
        self._refuse(StorageError(f"the run's log cannot be written any more: {error}"))

    async def _write_all(self) -> None:
        while (first := await self._inbox.get()) is not None:
            batch = [first]
            while len(batch) < BATCH_EVENTS and not self._inbox.empty():
                following = self._inbox.get_nowait()
                if following is None:
                    self._inbox.put_nowait(None)
                    break
                batch.append(following)
            await self._append(batch)

    async def _append(self, batch: Sequence[tuple[Event, asyncio.Future[int]]]) -> None:
        """Tick, make durable, and only then show."""
        state = self.state
        records: list[Record] = []
        effects: list[NumberedEffect] = []
        for event, _ in batch:
            now, seed = max(clock_ms(), state.now_ms), secrets.randbits(63)
            result = tick(state, [event], now, seed)
            state = result.state
            records.append(Record(sequence=state.sequence, now_ms=now, seed=seed, event=event))
            effects += [NumberedEffect(sequence=e.sequence, n=e.n, effect=e.effect) for e in result.effects]
        keep = state if state.sequence - self._snapshot_at >= SNAPSHOT_EVERY_EVENTS else None
        await asyncio.to_thread(
            self._log.append,
            self._epoch,
            self.state.sequence,
            records,
            effects,
            keep,
            phase=state.phase if state.phase != self.state.phase else None,
        )
        self.state = state
        for record in effects:
            self._deliver(record)
        for (_, future), event_record in zip(batch, records, strict=True):
            if not future.done():
                future.set_result(event_record.sequence)
        async with self.changed:
            self.changed.notify_all()
        if keep is not None:
            before, self._snapshot_at = self._snapshot_at, keep.sequence
            await asyncio.to_thread(self._log.compact, self._epoch, before)

    def _deliver(self, effect: NumberedEffect) -> None:
        delivery = Delivery(sequence=effect.sequence, n=effect.n, body=effect.effect.body)
        to = effect.effect.to
        for mailbox in self._mailboxes:
            if to == mailbox.recipient or (to == EVERYONE and mailbox.is_client):
                mailbox.queue.put_nowait(delivery)

    async def _watch(self) -> None:
        """Deadlines and silence. If this process itself stood still, nobody else is blamed for it."""
        before = said = time.monotonic()
        while True:
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            if now - said >= ALIVE_EVERY_S:
                said = now
                await self._say_alive()
            stood_still = now - before - WATCH_S
            before = now
            if stood_still > 1.0:
                self._heard = {client: at + stood_still for client, at in self._heard.items()}
            deadline = next_deadline(self.state)
            if deadline is not None and clock_ms() >= deadline:
                await self.submit(ClockPassed())
            for client in list(self.state.clients.values()):
                await self._watch_client(client.key, now)

    async def _say_alive(self) -> None:
        """Also how a server that nothing happens to learns that it was replaced."""
        try:
            await asyncio.to_thread(self._log.renew, self._epoch)
        except StorageError as error:
            self._fail(error)

    def _expected(self, client: Client) -> bool:
        """Whether anything is to be heard of it: when the run is over everybody may go."""
        return is_live(client) and self.state.phase not in ("finished", "failed")

    async def _watch_client(self, key: ClientId, now: float) -> None:
        client = self.state.clients[key]
        if not self._expected(client):
            return
        silence = now - self._heard.setdefault(key, now)
        rounds = self.state.plan.rounds
        if silence > rounds.lost_after_s:
            await self.submit(Left(client=key, how="lost", reason=f"not heard for {silence:.0f} s"))
        elif silence > rounds.suspected_after_s and not client.suspected:
            await self.submit(Suspected(client=key))
