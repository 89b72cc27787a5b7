"""The runs of a server: descriptors as they were signed, and what a listing shows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import sqlalchemy as sa

from manyhands.errors import StorageError
from manyhands.storage.database import Database
from manyhands.storage.tables import runs


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A run's row. `descriptor`: the very bytes that `signature` signs. `phase` may lag behind the log."""

    run_id: str
    descriptor: bytes
    signature: str
    created_ms: int
    phase: str
    lease_epoch: int
    lease_owner: str | None
    lease_renewed_ms: int | None


def create_run(
    database: Database, run_id: str, descriptor: bytes, signature: str, created_ms: int | None = None
) -> bool:
    """Store a new run; False when this very descriptor is there already.

    descriptor: the canonical JSON that was signed; not looked into here. Raises StorageError when the run
    exists with another one: a run never changes.
    """
    now_ms = time.time_ns() // 1_000_000 if created_ms is None else created_ms
    with database.write() as connection:
        stored = connection.execute(sa.select(runs.c.descriptor).where(runs.c.run_id == run_id)).scalar()
        if stored is not None:
            if stored.encode() == descriptor:
                return False
            raise StorageError(
                f"run '{run_id}' exists in '{database.path}' with another plan or other data: choose another "
                "run_id, or start the server with the plan that the run was made from."
            )
        row = {
            "run_id": run_id,
            "descriptor": descriptor.decode(),
            "signature": signature,
            "created_ms": now_ms,
            "phase": "waiting",
            "outbox_from": 0,
            "lease_epoch": 0,
        }
        connection.execute(runs.insert(), [row])
    return True


def get_run(database: Database, run_id: str) -> StoredRun:
    """Raises StorageError, naming the runs that are there, when this one is not."""
    runs_there = {run.run_id: run for run in list_runs(database)}
    if run_id not in runs_there:
        known = ", ".join(runs_there) or "none"
        raise StorageError(
            f"run '{run_id}' is not in database '{database.path}'; it holds: {known}. The "
            "run of a server with a --data-dir of its own is in that directory."
        )
    return runs_there[run_id]


def list_runs(database: Database) -> list[StoredRun]:
    """All runs, oldest first."""
    with database.read() as connection:
        rows = connection.execute(sa.select(runs).order_by(runs.c.created_ms, runs.c.run_id)).all()
    return [
        StoredRun(
            run_id=row.run_id,
            descriptor=row.descriptor.encode(),
            signature=row.signature,
            created_ms=row.created_ms,
            phase=row.phase,
            lease_epoch=row.lease_epoch,
            lease_owner=row.lease_owner,
            lease_renewed_ms=row.lease_renewed_ms,
        )
        for row in rows
    ]
