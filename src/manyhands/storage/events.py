"""A run's log: what happened, in order, and the effects still to be delivered.

`append` is the one door in, and one transaction: it checks the run, the lease epoch and the next sequence
number, writes events and effects together, and returns when they are on the disk. So an effect never exists
without its event, and an event never without all of its effects. An owner whose epoch is no longer the newest
is Fenced: its append changes nothing, and the error names the new owner. Events are never deleted (the ledger
is made from them); effects are, once everybody has them (`compact`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from manyhands.coordination.effects import Effect
from manyhands.coordination.machine import NumberedEffect
from manyhands.coordination.records import Record, dump_body, dump_event, dump_state
from manyhands.coordination.state import RunState
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, EVERYONE
from manyhands.errors import Fenced, StorageError
from manyhands.storage.database import Database
from manyhands.storage.records import read_body, read_event, read_state
from manyhands.storage.tables import effects as effects_table
from manyhands.storage.tables import events, runs, state_snapshots

_PAGE = 1000  # records read in one transaction
_INT64 = 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Who owns a run. `epoch` 0: nobody ever did; `owner` None: the last one gave it back. `renewed_ms`: when it last
    said that it lives."""

    epoch: int
    owner: str | None
    renewed_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What a restart needs: the newest stored state (None: there is none yet) and the events after it."""

    state: RunState | None
    records: tuple[Record, ...]


class _Run(NamedTuple):
    lease_epoch: int
    lease_owner: str | None
    lease_renewed_ms: int | None
    outbox_from: int


class RunLog:
    """The log of one run. Thread-safe, as the database is; it keeps nothing in memory."""

    def __init__(self, database: Database, run_id: str) -> None:
        self._database = database
        self.run_id = run_id

    # --------------------------------------------------------------------------------------- lease
    def lease(self) -> Lease:
        with self._database.read() as connection:
            row = self._run(connection)
        return Lease(epoch=row.lease_epoch, owner=row.lease_owner, renewed_ms=row.lease_renewed_ms)

    def acquire(self, owner: str, now_ms: int | None = None) -> int:
        """Take the run over for `owner` (an address); returns the new epoch. Older ones are fenced from now on.

        It does not ask whether the old owner is still alive: look at `lease()` first if that matters.
        """
        with self._database.write() as connection:
            epoch = self._run(connection).lease_epoch + 1
            self._update_run(
                connection, lease_epoch=epoch, lease_owner=owner, lease_renewed_ms=_clock(now_ms)
            )
        return epoch

    def renew(self, epoch: int, now_ms: int | None = None) -> None:
        """Say that the owner of `epoch` is alive. Raises Fenced."""
        with self._database.write() as connection:
            self._own(connection, epoch)
            self._update_run(connection, lease_renewed_ms=_clock(now_ms))

    def release(self, epoch: int, now_ms: int | None = None) -> None:
        """Give the run back at a clean end: nobody owns it until the next `acquire`. Raises Fenced."""
        with self._database.write() as connection:
            self._own(connection, epoch)
            self._update_run(connection, lease_owner=None, lease_renewed_ms=_clock(now_ms))

    # --------------------------------------------------------------------------------------- writing
    def append(
        self,
        epoch: int,
        expected_sequence: int,
        records: Sequence[Record],
        effects: Sequence[NumberedEffect],
        snapshot: RunState | None = None,
        *,
        phase: str | None = None,
    ) -> None:
        """Append events and their effects, all or nothing; durable on return. Many at once: group commit.

        expected_sequence: of the last event already in the log (0 for an empty one), that is `state.sequence`
        before the first of these ticks. `records` follow it without a gap; `effects` belong to them;
        `snapshot` is the state after the last of them. `phase` goes to the run's row, for listings. Raises
        Fenced when a newer epoch owns the run, StorageError when the sequence does not follow or the run is
        unknown: then nothing was changed.
        """
        last = _check_order(self.run_id, expected_sequence, records, effects, snapshot)
        event_rows = [self._event_row(epoch, record) for record in records]
        effect_rows = [self._effect_row(record) for record in effects]
        state = None if snapshot is None else dump_state(snapshot).decode()
        with self._database.write() as connection:
            self._own(connection, epoch)
            self._expect(connection, expected_sequence)
            if event_rows:
                connection.execute(events.insert(), event_rows)
            if effect_rows:
                connection.execute(effects_table.insert(), effect_rows)
            if state is not None:
                self._store_state(connection, last, state)
            if phase is not None:
                self._update_run(connection, phase=phase)

    def compact(self, epoch: int, sequence: int) -> None:
        """Drop the effects of events before `sequence`, and all stored states but the newest. Events stay.

        Afterwards `effects_after` answers only those who have seen an effect of `sequence` or later.
        """
        with self._database.write() as connection:
            run = self._own(connection, epoch)
            table = effects_table
            connection.execute(
                table.delete().where(table.c.run_id == self.run_id, table.c.sequence < sequence)
            )
            self._update_run(connection, outbox_from=max(run.outbox_from, sequence))
            newest = self._newest_state_sequence(connection)
            connection.execute(
                state_snapshots.delete().where(
                    state_snapshots.c.run_id == self.run_id, state_snapshots.c.sequence < newest
                )
            )

    # --------------------------------------------------------------------------------------- reading
    def load(self) -> Loaded:
        """The newest stored state and all events after it, as of one moment."""
        with self._database.read() as connection:
            self._run(connection)
            newest = self._newest_state_sequence(connection)
            body = connection.execute(
                sa.select(state_snapshots.c.body).where(
                    state_snapshots.c.run_id == self.run_id, state_snapshots.c.sequence == newest
                )
            ).scalar()
            records = self._events(connection, newest)
        return Loaded(state=None if body is None else read_state(body), records=tuple(records))

    def all_records(self, after: int = 0) -> Iterator[Record]:
        """Every event after number `after`, oldest first, a page at a time. The ledger is made from it."""
        while True:
            with self._database.read() as connection:
                self._run(connection)
                page = self._events(connection, after, _PAGE)
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].sequence

    def effects_after(
        self, recipient: str, after: tuple[int, int], limit: int | None = None
    ) -> list[NumberedEffect]:
        """Effects for `recipient` with ids after `after`, in order: what a reconnect still has to deliver.

        A client gets those addressed to itself and to EVERYONE; the aggregator and the evaluator only their
        own. Raises StorageError when some of them have been dropped: such a client has to join anew.
        """
        names = [recipient] if recipient in (AGGREGATOR, EVALUATOR, EVERYONE) else [recipient, EVERYONE]
        found: list[NumberedEffect] = []
        with self._database.read() as connection:
            kept_from = self._run(connection).outbox_from
            if after[0] < kept_from:
                raise StorageError(
                    f"effects of run '{self.run_id}' after {after} were dropped (kept from event "
                    f"{kept_from}): '{recipient}' has to join anew."
                )
            for name in names:
                rows = connection.execute(outbox_query(self.run_id, name, after, limit))
                found += [
                    NumberedEffect(
                        sequence=row.sequence, n=row.n, effect=Effect(to=name, body=read_body(row.body))
                    )
                    for row in rows
                ]
        return sorted(found, key=lambda record: record.id)[:limit]

    # --------------------------------------------------------------------------------------- inside
    def _run(self, connection: sa.Connection) -> _Run:
        row = connection.execute(
            sa.select(runs.c.lease_epoch, runs.c.lease_owner, runs.c.lease_renewed_ms, runs.c.outbox_from)
            .where(runs.c.run_id == self.run_id)
            .with_for_update()  # in databases that have row locks; SQLite has locked everything
        ).one_or_none()
        if row is None:
            raise StorageError(f"run '{self.run_id}' is not in database '{self._database.path}'.")
        return _Run(*row)

    def _own(self, connection: sa.Connection, epoch: int) -> _Run:
        row = self._run(connection)
        if row.lease_epoch != epoch:
            where = f"it is now at {row.lease_owner}" if row.lease_owner else "its owner has left"
            raise Fenced(
                f"run '{self.run_id}' was taken over (epoch {row.lease_epoch}, this server has {epoch}): "
                f"{where}; this server must stop serving it."
            )
        return row

    def _expect(self, connection: sa.Connection, expected: int) -> None:
        last = self._last_sequence(connection)
        if last != expected:
            raise StorageError(
                f"log of run '{self.run_id}' ends at event {last}, not at {expected}: "
                "load it again before appending."
            )

    def _last_sequence(self, connection: sa.Connection) -> int:
        query = sa.select(sa.func.max(events.c.sequence)).where(events.c.run_id == self.run_id)
        return connection.execute(query).scalar() or 0

    def _newest_state_sequence(self, connection: sa.Connection) -> int:
        column = state_snapshots.c.sequence
        query = sa.select(sa.func.max(column)).where(state_snapshots.c.run_id == self.run_id)
        return connection.execute(query).scalar() or 0

    def _update_run(self, connection: sa.Connection, **values: object) -> None:
        connection.execute(runs.update().where(runs.c.run_id == self.run_id).values(**values))

    def _store_state(self, connection: sa.Connection, sequence: int, body: str) -> None:
        row = {"run_id": self.run_id, "sequence": sequence, "body": body}
        here = (state_snapshots.c.run_id == self.run_id, state_snapshots.c.sequence == sequence)
        connection.execute(state_snapshots.delete().where(*here))
        connection.execute(state_snapshots.insert(), [row])

    def _events(self, connection: sa.Connection, after: int, limit: int | None = None) -> list[Record]:
        rows = connection.execute(
            sa.select(events)
            .where(events.c.run_id == self.run_id, events.c.sequence > after)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        return [
            Record(sequence=row.sequence, now_ms=row.now_ms, seed=row.seed, event=read_event(row.body))
            for row in rows
        ]

    def _event_row(self, epoch: int, record: Record) -> dict[str, object]:
        return {
            "run_id": self.run_id,
            "sequence": record.sequence,
            "epoch": epoch,
            "now_ms": record.now_ms,
            "seed": record.seed,
            "body": dump_event(record.event).decode(),
        }

    def _effect_row(self, record: NumberedEffect) -> dict[str, object]:
        return {
            "run_id": self.run_id,
            "sequence": record.sequence,
            "n": record.n,
            "recipient": record.effect.to,
            "body": dump_body(record.effect.body).decode(),
        }


def outbox_query(run_id: str, name: str, after: tuple[int, int], limit: int | None) -> sa.Select[Any]:
    """Effects addressed to one name after `after`. One name at a time: with two of them SQLite would read the
    effects of all clients."""
    table = effects_table
    return (
        sa.select(table.c.sequence, table.c.n, table.c.body)
        .where(
            table.c.run_id == run_id,
            table.c.recipient == name,
            table.c.sequence >= after[0],  # the part of the next condition that the index can use
            sa.or_(table.c.sequence > after[0], table.c.n > after[1]),
        )
        .order_by(table.c.sequence, table.c.n)
        .limit(limit)
    )


def _check_order(
    run_id: str,
    expected: int,
    records: Sequence[Record],
    effects: Sequence[NumberedEffect],
    snapshot: RunState | None,
) -> int:
    """Refuse what would leave a log with gaps; returns the last sequence number after the append."""
    last = expected
    for record in records:
        last += 1
        if record.sequence != last:
            raise StorageError(f"run '{run_id}': event {record.sequence} appended where {last} was expected.")
        if not (0 <= record.seed < _INT64 and 0 <= record.now_ms < _INT64):
            raise StorageError(f"run '{run_id}': seed and time of event {last} must be in [0, 2^63).")
    for effect in effects:
        if not expected < effect.sequence <= last:
            raise StorageError(
                f"run '{run_id}': effect {effect.id} belongs to no event of ({expected}, {last}]."
            )
    if snapshot is not None and snapshot.sequence != last:
        raise StorageError(
            f"run '{run_id}': a state after event {snapshot.sequence} was given, the log would end at {last}."
        )
    return last


def _clock(now_ms: int | None) -> int:
    return time.time_ns() // 1_000_000 if now_ms is None else now_ms
