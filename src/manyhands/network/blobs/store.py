"""Blobs on a disk, by content.

    objects/ab/abcd...              the bytes: there, whole and checked, or not there at all
    objects/ab/abcd....manifest     their manifest
    partial/abcd.../data, manifest  half-written: preallocated, chunks in any order

Only chunks whose hash is right are written. Which chunks a half-written blob has is kept in memory; after a
crash it is found by hashing again, so no bookkeeping can be wrong. `complete` returns when bytes, manifest
and directory entries are on the disk. Blobs are immutable. Thread-safe; everything here blocks, so call it in
a thread. Writing one half-written blob from two processes is not supported; reading, and `put_file`, are.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from manyhands.coordination.types import BlobId, BlobRef
from manyhands.errors import BlobError, StorageError
from manyhands.network.blobs.manifest import (
    DEFAULT_MAX_BYTES,
    Manifest,
    is_blob_id,
    manifest_of,
    matching_chunks,
    max_manifest_bytes,
    read_exactly,
    write_exactly,
)
from manyhands.storage.durable import sync

DEFAULT_RESERVE_BYTES = 64 * 1024 * 1024
_CACHED_MANIFESTS = 128


class UnknownBlob(BlobError):
    """The store does not have it, and nobody has begun to write it."""


class IncompleteBlob(BlobError):
    """Some chunks are still missing."""


class CorruptChunk(BlobError):
    """Bytes that are not what the manifest says."""


@dataclass
class _Partial:
    """A blob under way. `manifest` is None until it was loaded or begun, under the lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    manifest: Manifest | None = None
    have: set[int] = field(default_factory=set)


class BlobStore:
    """See the module. `reserve_bytes` of the disk are never filled; durable=False leaves out every fsync."""

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        durable: bool = True,
    ) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.reserve_bytes = reserve_bytes
        self.durable = durable
        self._objects = directory / "objects"
        self._partial = directory / "partial"
        self._lock = threading.Lock()
        self._partials: dict[BlobId, _Partial] = {}
        self._manifests: OrderedDict[BlobId, Manifest] = OrderedDict()
        with self._disk("prepare"):
            self._objects.mkdir(parents=True, exist_ok=True)
            self._partial.mkdir(exist_ok=True)

    # --------------------------------------------------------------------------------------- reading
    def has(self, blob: BlobId) -> bool:
        """Whether it is there, whole."""
        return self._object(blob).is_file()

    def path(self, blob: BlobId) -> Path:
        """The file with the bytes, to be read only. Raises UnknownBlob."""
        path = self._object(blob)
        if not path.is_file():
            raise UnknownBlob(f"blob {blob} is not in the store.")
        return path

    def manifest(self, blob: BlobId) -> Manifest:
        """Of a whole blob. Raises UnknownBlob, BlobError."""
        with self._lock:
            known = self._manifests.get(blob)
            if known is not None:
                self._manifests.move_to_end(blob)
        if known is None:
            self.path(blob)
            known = self._read_manifest(blob, self._manifest_path(blob))
            self._remember(blob, known)
        return known

    def read_chunk(self, blob: BlobId, index: int) -> bytes:
        """The bytes of a chunk as they are on the disk; who gets them checks them. Raises BlobError."""
        manifest = self.manifest(blob)
        length = manifest.length(index)
        try:
            with _opened(self._object(blob), os.O_RDONLY) as file:
                return read_exactly(file, length, manifest.offset(index))
        except FileNotFoundError:
            raise UnknownBlob(f"blob {blob} is not in the store any more.") from None
        except OSError as error:
            raise BlobError(f"chunk {index} of blob {blob} cannot be read ({error}).") from error

    def verify(self, blob: BlobId) -> None:
        """Hash a blob again. Raises BlobError naming the chunks that the disk has spoiled."""
        manifest, actual = self.manifest(blob), manifest_of(self.path(blob))
        if actual == manifest:
            return
        pairs = zip(actual.chunks, manifest.chunks, strict=False)
        bad = [str(index) for index, (one, other) in enumerate(pairs) if one != other]
        raise BlobError(
            f"blob {blob} is damaged on the disk ({actual.size_bytes} bytes, {manifest.size_bytes} expected; "
            f"wrong chunks: {', '.join(bad[:8]) or 'those past its end'}): delete it and fetch it again."
        )

    def blobs(self) -> Iterator[BlobId]:
        """Ids of all whole blobs."""
        for path in self._objects.glob("??/*"):
            if is_blob_id(path.name):
                yield path.name

    # --------------------------------------------------------------------------------------- writing
    def begin(self, manifest: Manifest) -> list[int]:
        """Start, or go on with, writing a blob; returns the missing chunks, none for a blob that is there.

        Raises BlobError for one that is larger than the store takes, StorageError when the disk has no room.
        """
        blob = manifest.blob
        if manifest.size_bytes > self.max_bytes:
            raise BlobError(
                f"blob {blob} has {manifest.size_bytes} bytes: at most {self.max_bytes} are stored."
            )
        if self.has(blob):
            return []
        with self._lock:
            partial = self._partials.setdefault(blob, _Partial())
        with partial.lock, self._disk(f"write blob {blob} to"):
            if partial.manifest is None and not self._load(blob, partial):
                self._allocate(manifest)
                partial.manifest = manifest
            return self._missing(partial)

    def write_chunk(self, blob: BlobId, index: int, *parts: bytes | memoryview) -> None:
        """Check and write one chunk, given whole or in parts. Idempotent.

        Raises CorruptChunk when hash or length are wrong (nothing is written then), UnknownBlob when the blob
        was not begun, StorageError.
        """
        if self.has(blob):
            manifest, partial = self.manifest(blob), None
        else:
            manifest, partial = self._under_way(blob)
        length = manifest.length(index)
        if (given := sum(map(len, parts))) != length:
            raise CorruptChunk(f"chunk {index} of blob {blob} has {length} bytes: {given} were given.")
        if not manifest.fits(index, parts):
            raise CorruptChunk(
                f"chunk {index} of blob {blob}: the {length} bytes given do not have its SHA-256."
            )
        if partial is None or index in partial.have:
            return
        with self._disk(f"write blob {blob} to"), _opened(self._partial / blob / "data", os.O_WRONLY) as file:
            write_exactly(file, parts, manifest.offset(index))
            if self.durable:
                _start_writeback(file, manifest.offset(index), length)
        with partial.lock:
            partial.have.add(index)

    def wanted(self, blob: BlobId) -> Manifest:
        """Of a blob that is there or under way: what chunks to expect. Raises UnknownBlob."""
        return self.manifest(blob) if self.has(blob) else self._under_way(blob)[0]

    def missing(self, blob: BlobId) -> list[int]:
        """Chunks still to be written; none for a whole blob. Raises UnknownBlob."""
        if self.has(blob):
            return []
        _, partial = self._under_way(blob)
        with partial.lock:
            return self._missing(partial)

    def complete(self, blob: BlobId) -> BlobRef:
        """Make a fully written blob visible; durable on return. Idempotent.

        Raises IncompleteBlob, UnknownBlob, StorageError.
        """
        if self.has(blob):
            return self.manifest(blob).ref
        manifest, partial = self._under_way(blob)
        with partial.lock, self._disk(f"write blob {blob} to"):
            if self.has(blob):
                return manifest.ref
            missing = self._missing(partial)
            if missing:
                some = ", ".join(str(index) for index in missing[:8])
                raise IncompleteBlob(
                    f"blob {blob} still misses {len(missing)} chunks ({some} ...): send them first."
                )
            aside = self._partial / blob
            with _opened(aside / "data", os.O_WRONLY) as file:
                self._sync(file)
            self._place(manifest, aside / "data")
            shutil.rmtree(aside, ignore_errors=True)
        with self._lock:
            self._partials.pop(blob, None)
        return manifest.ref

    def put_file(self, path: Path, *, move: bool = True, manifest: Manifest | None = None) -> BlobRef:
        """Take a file of this machine in; durable on return. move=True: the file itself, which is then gone.

        manifest: of the file, when it is known for certain. Raises BlobError, StorageError.
        """
        known = manifest or manifest_of(path)
        with self._disk(f"write blob {known.blob} to"):
            if self.has(known.blob):
                if move:
                    path.unlink()
                return known.ref
            source = path
            if not move or path.stat().st_dev != self._objects.stat().st_dev:
                self._check_space(known)
                source = self._partial / f"{known.blob}.{uuid.uuid4().hex}"
                shutil.copyfile(path, source)
            with _opened(source, os.O_WRONLY) as file:
                self._sync(file)
            self._place(known, source)
            if move and source is not path:
                path.unlink()
        return known.ref

    def delete(self, blob: BlobId) -> bool:
        """Forget a blob, whole or half-written; False when there was none."""
        with self._lock:
            self._partials.pop(blob, None)
            self._manifests.pop(blob, None)
        aside, there = self._partial / blob, self.has(blob)
        with self._disk(f"delete blob {blob} from"):
            self._object(blob).unlink(missing_ok=True)  # first: without it the manifest means nothing
            self._manifest_path(blob).unlink(missing_ok=True)
            if aside.is_dir():
                there = True
                shutil.rmtree(aside)
        return there

    def sweep(self, max_age_s: float = 24 * 3600.0) -> int:
        """At start: remove half-written blobs untouched for so long, and what a crash left; returns how many.

        Younger half-written blobs stay, so that their uploads can go on; 0 removes all.
        """
        removed, oldest = 0, time.time() - max_age_s
        with self._disk("sweep"):
            for entry in self._partial.iterdir():
                data = entry / "data"
                if data.is_file() and (entry / "manifest").is_file() and data.stat().st_mtime > oldest:
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
                removed += 1
                with self._lock:
                    self._partials.pop(entry.name, None)
            for path in self._objects.glob("??/*.manifest*"):
                if not path.with_name(path.name.partition(".")[0]).is_file():
                    path.unlink()
        return removed

    # --------------------------------------------------------------------------------------- inside
    def _object(self, blob: BlobId) -> Path:
        if not is_blob_id(blob):
            raise BlobError(f"blob id '{blob[:80]}' is not 64 lower-case hex digits.")
        return self._objects / blob[:2] / blob

    def _manifest_path(self, blob: BlobId) -> Path:
        return self._object(blob).with_name(blob + ".manifest")

    def _under_way(self, blob: BlobId) -> tuple[Manifest, _Partial]:
        """A half-written blob, from memory, or after a restart from the disk."""
        with self._lock:
            partial = self._partials.get(blob)
        if partial is None and (self._partial / blob / "manifest").is_file():
            with self._lock:
                partial = self._partials.setdefault(blob, _Partial())
        if partial is not None:
            with partial.lock, self._disk(f"read blob {blob} from"):
                if partial.manifest is not None or self._load(blob, partial):
                    assert partial.manifest is not None
                    return partial.manifest, partial
        raise UnknownBlob(f"blob {blob} is not in the store: send its manifest first.")

    def _load(self, blob: BlobId, partial: _Partial) -> bool:
        """Find on the disk what was written before a crash; False when there is nothing usable. Lock held."""
        aside = self._partial / blob
        try:
            manifest = self._read_manifest(blob, aside / "manifest")
            with _opened(aside / "data", os.O_RDONLY) as file:
                partial.have = matching_chunks(file, manifest)
        except (BlobError, FileNotFoundError):
            return False
        partial.manifest = manifest
        return True

    def _allocate(self, manifest: Manifest) -> None:
        """Lay out a half-written blob: the space first, the manifest, which makes it one, last."""
        self._check_space(manifest)
        aside = self._partial / manifest.blob
        aside.mkdir(exist_ok=True)
        with _opened(aside / "data", os.O_RDWR | os.O_CREAT | os.O_TRUNC) as file:
            if manifest.size_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, manifest.size_bytes)
        self._write_manifest(manifest, aside / "manifest")

    def _check_space(self, manifest: Manifest) -> None:
        check_space(self.directory, manifest.size_bytes, self.reserve_bytes, f"blob {manifest.blob}")

    def _missing(self, partial: _Partial) -> list[int]:
        assert partial.manifest is not None
        return [i for i in range(len(partial.manifest.chunks)) if i not in partial.have]

    def _place(self, manifest: Manifest, source: Path) -> None:
        """Give synced bytes their name. The manifest comes first: bytes without it would not be a blob."""
        target = self._object(manifest.blob)
        fresh = not target.parent.is_dir()
        target.parent.mkdir(exist_ok=True)
        self._write_manifest(manifest, self._manifest_path(manifest.blob))
        os.replace(source, target)
        self._sync_directory(target.parent)
        if fresh:
            self._sync_directory(self._objects)
        self._remember(manifest.blob, manifest)

    def _write_manifest(self, manifest: Manifest, path: Path) -> None:
        aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        with _opened(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as file:
            write_exactly(file, [manifest.to_json()], 0)
            self._sync(file)
        os.replace(aside, path)

    def _read_manifest(self, blob: BlobId, path: Path) -> Manifest:
        try:
            with path.open("rb") as file:
                body = file.read(max_manifest_bytes(self.max_bytes) + 1)
        except FileNotFoundError:
            raise BlobError(f"the manifest of blob {blob} is gone from '{path}': delete the blob.") from None
        except OSError as error:
            raise BlobError(f"the manifest of blob {blob} cannot be read ({error}).") from error
        manifest = Manifest.from_json(body, max_bytes=self.max_bytes)
        if manifest.blob != blob:
            raise BlobError(
                f"the manifest of blob {blob} in '{path}' is damaged: delete the blob, fetch it again."
            )
        return manifest

    def _remember(self, blob: BlobId, manifest: Manifest) -> None:
        with self._lock:
            self._manifests[blob] = manifest
            while len(self._manifests) > _CACHED_MANIFESTS:
                self._manifests.popitem(last=False)

    def _sync(self, file: int) -> None:
        if self.durable:
            os.fsync(file)

    def _sync_directory(self, directory: Path) -> None:
        if self.durable:
            sync(directory)

    @contextmanager
    def _disk(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"could not {doing} store '{self.directory}' ({error}): check disk and space."
            ) from error


def check_space(directory: Path, needed_bytes: int, reserve_bytes: int, what: str) -> None:
    """Raises StorageError when a disk has not room for `needed_bytes` and a reserve."""
    free = shutil.disk_usage(directory).free
    if free < needed_bytes + reserve_bytes:
        raise StorageError(
            f"{what} needs {needed_bytes} bytes at '{directory}', and {reserve_bytes} are to stay free: only "
            f"{free} are. Free some space, or use another directory."
        )


def _start_writeback(file: int, offset: int, length: int) -> None:
    """Let the disk begin with these pages now, so that the fsync of `complete` finds little left to do.

    Measured here with chunks arriving at 500 MiB/s: 425 MiB/s until durable with it, 217 to 284 without.
    Where there is no sync_file_range, nothing is lost but that.
    """
    if _sync_file_range is not None:
        _sync_file_range(file, offset, length, 2)  # SYNC_FILE_RANGE_WRITE: start, do not wait


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


_sync_file_range = _find_sync_file_range()


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0), 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
