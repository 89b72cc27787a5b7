"""Which blobs there are, what they are for, and which of them nobody needs any more.

The bytes are in the blob store (network/blobs/store.py). A blob is deleted there first and forgotten here
second, so a crash in between leaves a row whose file is gone, which the next pass deletes again, and never a
file that nobody knows of. The same bytes may serve several rounds, kinds or runs: a blob is deletable only
when no row needs it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import sqlalchemy as sa

from manyhands.coordination.types import BlobId, BlobRef
from manyhands.errors import StorageError
from manyhands.storage.database import Database
from manyhands.storage.tables import blobs

BlobKind = Literal["update", "snapshot", "change", "material", "checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlob:
    """`round`: the latest one that uses it, None where it belongs to no round."""

    ref: BlobRef
    run_id: str
    kind: BlobKind
    created_ms: int
    round: int | None


class BlobIndex:
    """The blobs of one run. Thread-safe."""

    def __init__(self, database: Database, run_id: str) -> None:
        self._database = database
        self.run_id = run_id

    def add(
        self, ref: BlobRef, kind: BlobKind, *, round: int | None = None, created_ms: int | None = None
    ) -> None:
        """Note a blob that is on the disk. Idempotent; of several rounds the latest is kept. Raises
        StorageError."""
        if kind not in get_args(BlobKind):
            raise StorageError(
                f"blob kind '{kind}' is unknown: expected one of {', '.join(get_args(BlobKind))}."
            )
        now_ms = time.time_ns() // 1_000_000 if created_ms is None else created_ms
        here = (blobs.c.blob == ref.blob, blobs.c.run_id == self.run_id, blobs.c.kind == kind)
        with self._database.write() as connection:
            row = connection.execute(sa.select(blobs).where(*here)).one_or_none()
            if row is None:
                values = {
                    "blob": ref.blob,
                    "run_id": self.run_id,
                    "kind": kind,
                    "size_bytes": ref.size_bytes,
                    "created_ms": now_ms,
                    "round": round,
                }
                connection.execute(blobs.insert(), [values])
            elif row.size_bytes != ref.size_bytes:
                raise StorageError(
                    f"blob {ref.blob} has {row.size_bytes} bytes in the index, {ref.size_bytes} were given."
                )
            elif round is not None and (row.round is None or row.round < round):
                connection.execute(blobs.update().where(*here).values(round=round))

    def get(self, blob: BlobId) -> list[StoredBlob]:
        """What this run uses a blob for; empty when it does not."""
        return self._select(blobs.c.blob == blob)

    def all(self, kind: BlobKind | None = None) -> list[StoredBlob]:
        """This run's blobs, oldest first."""
        return self._select(*([] if kind is None else [blobs.c.kind == kind]))

    def deletable(self, before: Mapping[BlobKind, int]) -> list[BlobId]:
        """Blobs that only rounds before `before[kind]` have used, and nothing else in any run; oldest first.

        A kind that `before` does not name, or a blob of no round, is never deletable.
        """
        old, other = blobs.alias("old"), blobs.alias("other")
        kept = (
            sa.select(sa.literal(1))
            .where(other.c.blob == old.c.blob)
            .where(sa.not_(sa.and_(other.c.run_id == self.run_id, _is_old(other, before))))
        )
        query = (
            sa.select(old.c.blob)
            .where(old.c.run_id == self.run_id, _is_old(old, before))
            .where(~sa.exists(kept))
            .order_by(old.c.round, old.c.blob)
        )
        with self._database.read() as connection:
            return list(dict.fromkeys(connection.execute(query).scalars()))

    def forget(self, names: Iterable[BlobId], before: Mapping[BlobKind, int]) -> None:
        """Remove the rows of blobs whose files were deleted; rows that a later round has renewed stay."""
        wanted = list(names)
        with self._database.write() as connection:
            for name in wanted:
                connection.execute(
                    blobs.delete().where(
                        blobs.c.blob == name, blobs.c.run_id == self.run_id, _is_old(blobs, before)
                    )
                )

    def _select(self, *where: sa.ColumnElement[bool]) -> list[StoredBlob]:
        query = sa.select(blobs).where(blobs.c.run_id == self.run_id, *where).order_by(blobs.c.created_ms)
        with self._database.read() as connection:
            rows = connection.execute(query).all()
        return [
            StoredBlob(
                ref=BlobRef(blob=row.blob, size_bytes=row.size_bytes),
                run_id=row.run_id,
                kind=row.kind,
                created_ms=row.created_ms,
                round=row.round,
            )
            for row in rows
        ]


def _is_old(table: sa.FromClause, before: Mapping[BlobKind, int]) -> sa.ColumnElement[bool]:
    of_kinds = [sa.and_(table.c.kind == kind, table.c.round < limit) for kind, limit in before.items()]
    return sa.and_(table.c.round.is_not(None), sa.or_(sa.false(), *of_kinds))
