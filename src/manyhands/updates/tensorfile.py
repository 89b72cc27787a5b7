"""Safetensors files as mapped memory: created with a schema and written in place, or opened to be read.

Mapped pages belong to the file, not to the process's anonymous memory, so weights and outer state of any size cost
the aggregator none. A new file is written under another name and renamed when it is complete and on disk; a
half-written one is never seen under its name.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from manyhands.errors import StorageError, UpdateError
from manyhands.plan import wire
from manyhands.plan.wire import Layout, Schema
from manyhands.storage.durable import sync
from manyhands.updates.codecs import NUMPY

Arrays = Mapping[str, npt.NDArray[Any]]

_OWN_HEADER_LIMIT = 100_000_000


class TensorFile:
    """Tensors of one file, as arrays over its mapping. `arrays` is valid until `close`.

    After `close` the mapping lives on as long as an array of it does.
    """

    def __init__(self, path: Path, layout: Layout, mapping: mmap.mmap) -> None:
        self.path = path
        self.metadata = layout.metadata
        self.codes = {name: placed.dtype for name, placed in layout.tensors.items()}
        self._mapping: mmap.mmap | None = mapping
        self.arrays: dict[str, npt.NDArray[Any]] = {
            name: np.frombuffer(
                mapping,
                dtype=NUMPY[placed.dtype],
                count=placed.bytes // wire.ITEM_BYTES[placed.dtype],
                offset=layout.data_start + placed.start,
            ).reshape(placed.shape)
            for name, placed in layout.tensors.items()
        }

    def flush(self) -> None:
        """Everything written is on disk when this returns."""
        assert self._mapping is not None
        self._mapping.flush()
        sync(self.path)

    def close(self) -> None:
        self.arrays = {}
        mapping, self._mapping = self._mapping, None
        if mapping is not None:
            try:
                mapping.close()
            except BufferError:  # someone still holds an array: the mapping goes with the last of them
                del mapping

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def create(path: Path, schema: Schema, metadata: Mapping[str, str] | None = None) -> TensorFile:
    """A file of this schema, mapped writable, its disk space reserved. Reuses a file that is already there.

    Raises StorageError when the disk is full.
    """
    header = wire.encode_header(schema, metadata)
    placed = wire.layout(schema)
    size = len(header) + placed.data_bytes
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)  # a full disk is an error here, not a SIGBUS later
        os.pwrite(descriptor, header, 0)
        mapping = mmap.mmap(descriptor, size)
    except OSError as error:
        raise StorageError(
            f"cannot make {path} of {size} bytes: {error}; free some disk space and try again"
        ) from None
    finally:
        os.close(descriptor)
    found = Layout(
        tensors=placed.tensors,
        data_bytes=placed.data_bytes,
        data_start=len(header),
        metadata=dict(metadata or {}),
    )
    return TensorFile(path, found, mapping)


@contextmanager
def written(
    path: Path, schema: Schema, metadata: Mapping[str, str] | None = None, *, durable: bool = True
) -> Iterator[dict[str, Any]]:
    """Arrays of a new file to be filled in the block, which is renamed to `path` when it ends without error.

    `durable`: on disk by then. Otherwise complete, but a crash of the machine may take it back: for a file that is
    stored elsewhere before anybody relies on it.
    """
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    try:
        with create(aside, schema, metadata) as file:
            yield file.arrays
            if durable:
                file.flush()
        if durable:
            publish(aside, path)
        else:
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def open_checked(path: Path, schema: Schema, *, private: bool = False, metadata: bool = False) -> TensorFile:
    """A file from outside, mapped read-only, its header checked against the schema. Raises UpdateError.

    `private`: writable arrays whose changes never reach the file; `metadata`: it may carry some.
    """
    try:
        layout = wire.check_header(path, schema, metadata=metadata)
        return TensorFile(path, layout, _map(path, layout, mmap.ACCESS_COPY if private else mmap.ACCESS_READ))
    except OSError as error:
        raise UpdateError(f"cannot read {path}: {error}") from None


def open_own(path: Path, schema: Schema | None = None, *, private: bool = False) -> TensorFile:
    """A file that this program wrote: with a schema it must have it. Raises StorageError."""
    try:
        if schema is not None:
            return open_checked(path, schema, private=private)
        layout = wire.parse_header(path, limit_bytes=_OWN_HEADER_LIMIT)
        return TensorFile(path, layout, _map(path, layout, mmap.ACCESS_COPY if private else mmap.ACCESS_READ))
    except (OSError, UpdateError) as error:
        raise StorageError(f"cannot open {path}: {error}") from None


def publish(aside: Path, path: Path) -> None:
    """Rename a file that is on disk, and make the new name durable."""
    os.replace(aside, path)
    sync(path.parent)


def flush_all(*files: TensorFile) -> None:
    """Flush several files at once: the disk's queue serves them together."""
    with ThreadPoolExecutor(max(1, len(files))) as pool:
        list(pool.map(TensorFile.flush, files))


def _map(path: Path, layout: Layout, access: int) -> mmap.mmap:
    with path.open("rb") as file:
        size = layout.data_start + layout.data_bytes
        if os.fstat(file.fileno()).st_size != size:
            raise UpdateError(f"{path} changed its length while it was opened; expected {size} bytes")
        return mmap.mmap(file.fileno(), size, access=access)
