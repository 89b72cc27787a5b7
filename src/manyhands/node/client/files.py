"""A client's files and transfers: materials, snapshots, changes and updates, each fetched once and checked.

Blobs that are needed again after a worker's death (a snapshot, the changes since) stay until `forget` says that
they are not. Counts the bytes that went up and down.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

from manyhands.coordination.effects import Closed
from manyhands.coordination.types import BlobRef
from manyhands.errors import BlobError, ManyhandsError, Refused, ServerUnreachable
from manyhands.network.blobs.manifest import Manifest
from manyhands.network.blobs.transfer import download, upload
from manyhands.network.connection import Connection
from manyhands.node.directories import ParticipantDirectory

ATTEMPTS = 8
BLOB_ATTEMPTS = 3
"""Of a blob that is wrong or not there: that is no fault of the way."""


class Attempts:
    """Counts what a transfer may still try. What fails because its session has ended costs nothing: a server that is
    started again and again, or a weak line, only takes longer. Without `insisting` the first no is the last."""

    def __init__(self, connection: Connection, *, insisting: bool = True) -> None:
        self._connection = connection
        self._insisting = insisting
        self._session = connection.session
        self._left = 1.0

    async def begin(self) -> None:
        await self._connection.until_connected()
        self._session = self._connection.session

    async def failed(self, error: ManyhandsError) -> None:
        """Wait a while; raises the error when it was tried often enough."""
        if self._session is not None and self._connection.session is self._session:
            if not self._insisting and not isinstance(error, ServerUnreachable):
                raise error
            self._left -= 1 / (BLOB_ATTEMPTS if isinstance(error, BlobError) else ATTEMPTS)
            if self._left < 0.01:
                raise error
        await asyncio.sleep(0.3 + 2.0 * (1.0 - self._left))


class ClientFiles:
    """In the participant's directory, which is locked."""

    def __init__(self, directory: ParticipantDirectory) -> None:
        self.directory = directory
        self.materials = directory.sub("materials")
        self.updates = directory.sub("updates")
        self.blobs = directory.sub("blobs")
        self.logs = directory.sub("logs")
        self.bytes_up = 0
        self.bytes_down = 0
        shutil.rmtree(self.updates)
        self.updates.mkdir()
        for left_behind in directory.path.glob("public-*.safetensors"):
            left_behind.unlink()

    # ------------------------------------------------------------------ the plan that this directory is for
    def plan_hash(self) -> str | None:
        """Of the run that this directory has worked for, None for a new one."""
        try:
            remembered = json.loads((self.directory.path / "run.json").read_text())["plan_hash"]
        except FileNotFoundError:
            return None
        return str(remembered)

    def remember_plan(self, plan_hash: str) -> None:
        aside = self.directory.path / "run.json.part"
        aside.write_text(json.dumps({"plan_hash": plan_hash}))
        aside.replace(self.directory.path / "run.json")

    # ------------------------------------------------------------------ down
    async def fetch_material(self, connection: Connection, name: str, blob: str, size_bytes: int) -> None:
        """Make `materials/<name>`; kept from an earlier start if it was fetched for the same blob."""
        if "/" in name or name.startswith("."):
            raise Refused(f"the run names a material '{name}': not a plain file name")
        path, mark = self.materials / name, self.materials / f"{name}.blob"
        if path.exists() and mark.exists() and mark.read_text() == blob and path.stat().st_size == size_bytes:
            return
        fetched = await self.fetch(connection, BlobRef(blob=blob, size_bytes=size_bytes))
        fetched.replace(path)
        mark.write_text(blob)

    async def fetch(self, connection: Connection, ref: BlobRef, *, insisting: bool = True) -> Path:
        """A blob from the server, checked chunk by chunk. Goes on by itself after cuts and reconnects."""
        path = self.blobs / ref.blob
        if path.exists():
            return path
        attempts = Attempts(connection, insisting=insisting)
        while True:
            await attempts.begin()
            try:
                await download(connection.http, [connection.holder], ref, path, progress=self._count_down)
                return path
            except (BlobError, ServerUnreachable, Refused) as error:
                await attempts.failed(error)

    async def fetch_closed(self, connection: Connection, closed: Closed) -> list[Path]:
        """What a closing needs: the change (star), or the counted updates in their order (mesh)."""
        return [await self.fetch(connection, ref) for ref in closed.payloads]

    def adopt(self, path: Path, ref: BlobRef) -> None:
        """A file of ours is that blob: no need to fetch it."""
        if not (self.blobs / ref.blob).exists():
            os.link(path, self.blobs / ref.blob)

    def forget(self, keep: set[Path]) -> None:
        """Delete the blobs that are not among `keep`."""
        for path in self.blobs.iterdir():
            if path not in keep and not path.name.endswith(".part"):
                path.unlink()

    def forget_updates(self, keep: Path) -> None:
        """Delete updates of work that was given up too late for the worker not to write them."""
        for path in self.updates.glob("[0-9]*-*.safetensors"):
            if path != keep:
                path.unlink()

    # ------------------------------------------------------------------ up
    async def send(self, connection: Connection, path: Path, manifest: Manifest) -> None:
        """Upload a file as a blob; it is on the server's disk when this returns."""
        await upload(connection.http, connection.holder, path, manifest=manifest, progress=self._count_up)

    def _count_up(self, count: int) -> None:
        self.bytes_up += count

    def _count_down(self, count: int) -> None:
        self.bytes_down += count
