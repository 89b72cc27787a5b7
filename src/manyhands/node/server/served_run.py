"""A run as a server holds it: the descriptor, its coordinator, its blobs, and what a client may upload and read."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.network.blobs.store import BlobStore
from manyhands.node.server.run_driver import RunDriver
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.wire import Schema, layout, maximum_bytes, snapshot_schema, update_schema
from manyhands.storage.blob_index import BlobIndex, BlobKind

SNAPSHOT_HEADER_BYTES = 16 * 1024 * 1024


@dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
class ServedRun:
    """`directory`: the server's own files of this run. `readable`: blobs that clients of the run may fetch."""

    run_id: str
    descriptor: RunDescriptor
    descriptor_text: str
    descriptor_signature: str
    first: Snapshot
    driver: RunDriver
    blobs: BlobStore
    index: BlobIndex
    directory: Path
    update_schema: Schema = field(init=False)
    maximum_update_bytes: int = field(init=False)
    maximum_snapshot_bytes: int = field(init=False)
    readable: set[str] = field(default_factory=set)
    keeping: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a file becomes a blob, and while old blobs are deleted."""

    def __post_init__(self) -> None:
        plan, parameters = self.descriptor.plan, self.descriptor.parameters
        self.update_schema = update_schema(plan, parameters)
        self.maximum_update_bytes = maximum_bytes(plan, parameters)
        largest = snapshot_schema(plan, parameters, outer=plan.topology == "mesh")
        self.maximum_snapshot_bytes = layout(largest).data_bytes + SNAPSHOT_HEADER_BYTES
        self.readable = {m.blob for m in self.descriptor.materials.values()}
        self.readable.add(self.descriptor.first_snapshot.blob)

    async def keep_file(self, path: Path, kind: BlobKind, round_number: int | None) -> BlobRef:
        """Put a file of the server's own among the blobs (moving it), durable on return."""
        async with self.keeping:
            ref = await asyncio.to_thread(self.blobs.put_file, path, move=True)
            await self.register_blob(ref, kind, round_number)
        return ref

    async def register_blob(self, ref: BlobRef, kind: BlobKind, round_number: int | None) -> None:
        await asyncio.to_thread(self.index.add, ref, kind, round=round_number)
        if kind != "update":
            self.readable.add(ref.blob)

    def may_read(self, blob: str) -> bool:
        """Materials, snapshots and changes while they are kept; updates only in a mesh, once they are revealed."""
        if blob in self.readable:
            return True
        return self.descriptor.plan.topology == "mesh" and blob in self._revealed()

    def _revealed(self) -> set[str]:
        state = self.driver.state
        shown = {
            entry.contribution.update.blob
            for open_round in state.rounds.values()
            for entry in open_round.entries.values()
            if entry.revealed and entry.contribution is not None and entry.contribution.update is not None
        }
        shown |= {c.update.blob for closed in state.history for c in closed.closing.counted}
        return shown
