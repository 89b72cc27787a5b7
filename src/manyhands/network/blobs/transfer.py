"""Moving blobs: several chunks at once, each checked, resumed where a cut connection or a crash left off.

A download may use several holders at a time. What one of them says is never believed: the manifest must hash
to the blob's id, each chunk to its digest. A holder that lies twice, or that refuses, is left out; a slow one
cannot hold up the end, because idle holders take over what it has been sitting on. Verified chunks stay in
`<destination>.<blob>.part` when a download fails, and are not fetched again.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from manyhands.coordination.types import BlobRef
from manyhands.errors import BlobError, ManyhandsError, Refused, ServerUnreachable, StorageError
from manyhands.network.blobs.holders import (
    Effort,
    Gone,
    Holder,
    Incomplete,
    Passing,
    Patience,
    persist,
    read_into,
    read_limited,
    requested,
    unreachable,
)
from manyhands.network.blobs.manifest import (
    CHUNK_BYTES,
    DEFAULT_MAX_BYTES,
    Manifest,
    manifest_of,
    matching_chunks,
    max_manifest_bytes,
    read_exactly,
    write_exactly,
)
from manyhands.network.blobs.store import check_space
from manyhands.storage.durable import sync

Progress = Callable[[int], None]
"""Called with the bytes of each chunk that has arrived, or is found to be there already."""

_SEND_BYTES = 512 * 1024  # handed to the socket at once
_LIES = 2  # wrong answers after which a holder is left out
_TAKE_OVER_S = 2.0  # after so long under way a chunk may be asked of another holder too
_RESERVE_BYTES = 64 * 1024 * 1024


# ------------------------------------------------------------------------------------------- upload
async def upload(
    session: aiohttp.ClientSession,
    holder: Holder,
    path: Path,
    *,
    manifest: Manifest | None = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
) -> BlobRef:
    """Send a file; on return the server has it on its disk. Chunks that it has already are not sent again.

    manifest: of the file, when it is known. Raises ServerUnreachable when patience is over, Refused,
    BlobError.
    """
    effort = effort or Effort()
    known = manifest if manifest is not None else await asyncio.to_thread(manifest_of, path)
    sending = _Upload(session, holder, path, known, effort, progress or (lambda _: None))
    return await sending.run()


@dataclass
class _Upload:
    session: aiohttp.ClientSession
    holder: Holder
    path: Path
    manifest: Manifest
    effort: Effort
    progress: Progress
    there: set[int] = field(default_factory=set)

    async def run(self) -> BlobRef:
        what = f"upload of blob {self.manifest.blob} to {self.holder.url}"
        patience = Patience(self.effort)
        while True:
            before = len(self.there)
            try:
                missing = await persist(what, self.effort, self._begin)
                await self._send_all(missing, what)
                return await persist(what, self.effort, self._complete)
            except (Gone, Incomplete) as fault:  # the server has lost what was begun: begin again
                if len(self.there) > before:
                    patience.succeeded()
                if patience.over:
                    raise BlobError(f"{what}: {fault}") from None
                await patience.wait()

    async def _begin(self) -> list[int]:
        body = self.manifest.to_json()
        address = self.holder.address(self.manifest.blob)
        async with self._request("PUT", address, data=_pieces(body), headers=_length(body)) as answer:
            limit = 64 + 12 * len(self.manifest.chunks)
            value = _json_object(await read_limited(answer, limit), self.holder)
        missing = value.get("missing")
        valid = range(len(self.manifest.chunks))
        if not isinstance(missing, list) or not all(type(i) is int and i in valid for i in missing):
            raise BlobError(f"{self.holder.url} did not say which chunks it misses.")
        return missing

    async def _send_all(self, missing: list[int], what: str) -> None:
        for index in set(range(len(self.manifest.chunks))) - set(missing):
            self._count(index)
        queue = iter(missing)

        async def sender() -> None:
            for index in queue:  # shared by all senders: each chunk goes to one of them
                await persist(what, self.effort, partial(self._send, index))
                self._count(index)

        senders = [asyncio.create_task(sender()) for _ in range(min(self.effort.in_flight, len(missing)))]
        try:
            await asyncio.gather(*senders)
        finally:
            await _cancelled(senders)

    def _count(self, index: int) -> None:
        if index not in self.there:
            self.there.add(index)
            self.progress(self.manifest.length(index))

    async def _send(self, index: int) -> None:
        try:
            data = await asyncio.to_thread(_read_chunk, self.path, self.manifest, index)
        except OSError as error:
            raise BlobError(
                f"file '{self.path}' changed or cannot be read while it is sent ({error})."
            ) from None
        address = self.holder.address(self.manifest.blob, f"/chunks/{index}")
        async with self._request("PUT", address, data=_pieces(data), headers=_length(data)):
            pass

    async def _complete(self) -> BlobRef:
        address = self.holder.address(self.manifest.blob, "/complete")
        async with self._request("POST", address) as answer:
            value = _json_object(await read_limited(answer, 4096), self.holder)
        if value != {"blob": self.manifest.blob, "size_bytes": self.manifest.size_bytes}:
            raise BlobError(f"{self.holder.url} did not confirm blob {self.manifest.blob}.")
        return self.manifest.ref

    def _request(
        self, method: str, address: str, **options: Any
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        return requested(self.session, method, self.holder, address, self.effort, **options)


async def _pieces(data: bytes) -> AsyncIterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(data), _SEND_BYTES):
        yield view[start : start + _SEND_BYTES]


def _length(data: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(data)), "Content-Type": "application/octet-stream"}


def _json_object(body: bytes, holder: Holder) -> dict[str, object]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BlobError(f"{holder.url} did not answer with a JSON object: is it a manyhands server?")
    return value


# ------------------------------------------------------------------------------------------- download
async def download(
    session: aiohttp.ClientSession,
    holders: Sequence[Holder],
    ref: BlobRef,
    destination: Path,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    effort: Effort | None = None,
    progress: Progress | None = None,
    durable: bool = False,
) -> Manifest:
    """Fetch a blob into a file, which appears when it is whole; returns its manifest, for `BlobStore.put_file`.
    One download per destination at a time.

    A blob of more than `max_bytes` is refused before anything is asked. durable: fsync before the name
    appears. Raises ServerUnreachable, Refused, BlobError (nobody has it, or all who do lie), StorageError.
    """
    if ref.size_bytes > max_bytes:
        raise BlobError(f"blob {ref.blob} has {ref.size_bytes} bytes: at most {max_bytes} are accepted here.")
    if not holders:
        raise BlobError(f"blob {ref.blob}: no holder is known to fetch it from.")
    fetching = _Download(
        session, list(holders), ref, destination, effort or Effort(), progress or (lambda _: None)
    )
    return await fetching.run(durable)


@dataclass
class _Download:
    session: aiohttp.ClientSession
    holders: list[Holder]
    ref: BlobRef
    destination: Path
    effort: Effort
    progress: Progress
    pending: deque[int] = field(default_factory=deque)
    under_way: dict[int, dict[int, float]] = field(default_factory=dict)  # chunk -> holder -> since
    left: set[int] = field(default_factory=set)  # chunks not yet on this disk
    out: dict[int, ManyhandsError] = field(default_factory=dict)  # holder -> why it is left out
    lies: dict[int, int] = field(default_factory=dict)

    async def run(self, durable: bool) -> Manifest:
        self.patience = [Patience(self.effort) for _ in self.holders]
        self.manifest = await self._manifest()
        self.aside = self.destination.with_name(f"{self.destination.name}.{self.ref.blob[:16]}.part")
        have = await asyncio.to_thread(self._prepare)
        for index in have:
            self.progress(self.manifest.length(index))
        self.left = set(range(len(self.manifest.chunks))) - have
        self.pending.extend(sorted(self.left))
        await self._fetch_all()
        await asyncio.to_thread(self._finish, durable)
        return self.manifest

    # --------------------------------------------------------------------------------------- asking
    async def _manifest(self) -> Manifest:
        while True:
            for number, holder in enumerate(self.holders):
                if number not in self.out:
                    try:
                        return await self._manifest_from(holder)
                    except (Passing, ManyhandsError) as fault:
                        self._note(number, fault)
            self._check_somebody_left()
            await min(self.patience, key=lambda patience: patience.delay_s).wait()

    async def _manifest_from(self, holder: Holder) -> Manifest:
        address = holder.address(self.ref.blob, "/manifest")
        async with requested(self.session, "GET", holder, address, self.effort) as answer:
            body = await read_limited(answer, max_manifest_bytes(self.ref.size_bytes))
        manifest = Manifest.from_json(body, max_bytes=self.ref.size_bytes)
        if manifest.ref != self.ref:
            raise BlobError(f"{holder.url} sent the manifest of another blob than {self.ref.blob}.")
        return manifest

    async def _fetch_all(self) -> None:
        """All holders at once, until every chunk is there or nobody is left to ask."""
        each = min(self.effort.in_flight, len(self.left))
        tasks = {
            asyncio.create_task(self._fetch_from(n)) for n in range(len(self.holders)) for _ in range(each)
        }
        running = set(tasks)
        try:
            while self.left and running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        finally:
            await _cancelled(tasks)
        if self.left:
            self._check_somebody_left()

    async def _fetch_from(self, number: int) -> None:
        buffer = bytearray(min(CHUNK_BYTES, self.manifest.size_bytes))
        while self.left and number not in self.out:
            index = self._next(number)
            if index is None:
                await asyncio.sleep(0.05)  # the last chunks are under way with others
                continue
            fault = await self._try(number, index, buffer)
            if fault is not None:
                self._note(number, fault)
                self.pending.appendleft(index)
                await self.patience[number].wait()

    async def _try(self, number: int, index: int, buffer: bytearray) -> Passing | ManyhandsError | None:
        self.under_way.setdefault(index, {})[number] = time.monotonic()
        try:
            await self._fetch(number, index, buffer)
        except (Passing, Refused, BlobError) as fault:
            return fault
        finally:
            del self.under_way[index][number]
        return None

    def _next(self, number: int) -> int | None:
        """The chunk to ask this holder for; at the end one that another holder has been sitting on for long."""
        while self.pending:
            index = self.pending.popleft()
            if index in self.left:
                return index
        now = time.monotonic()
        slow = [
            (min(since.values()), index)
            for index, since in self.under_way.items()
            if index in self.left and since and number not in since
        ]
        since, index = min(slow, default=(now, -1))
        return index if now - since > _TAKE_OVER_S else None

    async def _fetch(self, number: int, index: int, buffer: bytearray) -> None:
        holder, length = self.holders[number], self.manifest.length(index)
        address = holder.address(self.ref.blob, f"/chunks/{index}")
        async with requested(self.session, "GET", holder, address, self.effort) as answer:
            got = await read_into(answer, buffer, length)
        if not await asyncio.to_thread(self._keep, index, memoryview(buffer)[:got]):
            raise BlobError(f"{holder.url} sent wrong bytes as chunk {index} of blob {self.ref.blob}.")
        self.patience[number].succeeded()
        if index in self.left:
            self.left.remove(index)
            self.progress(length)

    # --------------------------------------------------------------------------------------- faults
    def _note(self, number: int, fault: Passing | ManyhandsError) -> None:
        """Leave a holder out when asking it again makes no sense; a lie may be a fault of the way, two are
        not."""
        if isinstance(fault, Passing):
            if self.patience[number].over:
                what = f"download of blob {self.ref.blob} from {self.holders[number].url}"
                self.out[number] = unreachable(what, fault, self.effort)
            return
        self.lies[number] = self.lies.get(number, 0) + 1
        if isinstance(fault, Refused | Gone) or self.lies[number] >= _LIES:
            self.out[number] = fault

    def _check_somebody_left(self) -> None:
        if len(self.out) < len(self.holders):
            return
        reasons = list(self.out.values())
        text = f"blob {self.ref.blob} is not to be had: " + "; ".join(str(reason) for reason in reasons)
        for kind in (ServerUnreachable, Refused):
            if any(isinstance(reason, kind) for reason in reasons):
                raise kind(text)
        raise BlobError(text)

    # --------------------------------------------------------------------------------------- disk (threads)
    def _prepare(self) -> set[int]:
        """Lay out the file beside the destination, or find what an earlier try has left in it."""
        size = self.manifest.size_bytes
        try:
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.aside, os.O_RDWR)
            except FileNotFoundError:
                check_space(self.destination.parent, size, _RESERVE_BYTES, f"blob {self.ref.blob}")
                file = os.open(self.aside, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                have = matching_chunks(file, self.manifest)
                os.ftruncate(file, size)
                if size and hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file, 0, size)
            finally:
                os.close(file)
        except OSError as error:
            raise self._disk_fault(error) from error
        return have

    def _keep(self, index: int, data: memoryview) -> bool:
        """Write a chunk if it is the right one. The file is opened anew: this thread may outlive a cancelled
        task."""
        if not self.manifest.fits(index, [data]):
            return False
        try:
            file = os.open(self.aside, os.O_WRONLY)
            try:
                write_exactly(file, [data], self.manifest.offset(index))
            finally:
                os.close(file)
        except OSError as error:
            raise self._disk_fault(error) from error
        return True

    def _finish(self, durable: bool) -> None:
        try:
            if durable:
                sync(self.aside)
            os.replace(self.aside, self.destination)
            if durable:
                sync(self.destination.parent)
        except OSError as error:
            raise self._disk_fault(error) from error

    def _disk_fault(self, error: OSError) -> StorageError:
        return StorageError(f"blob {self.ref.blob} could not be written to '{self.destination}' ({error}).")


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel what still runs, and wait until it has."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _read_chunk(path: Path, manifest: Manifest, index: int) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return read_exactly(file, manifest.length(index), manifest.offset(index))
    finally:
        os.close(file)
