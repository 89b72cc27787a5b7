"""What a blob is: its size, the SHA-256 of each chunk, and an id that commits to both.

id = SHA-256("manyhands blob v1" || size || number of chunks || chunk digests), the two numbers as 8 bytes,
little endian: the prefix keeps it apart from every other hash of the house, the numbers make it unambiguous.
Every chunk but the last has CHUNK_BYTES; an empty blob has none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from manyhands.coordination.types import BlobId, BlobRef
from manyhands.errors import BlobError

CHUNK_BYTES = 4 * 1024 * 1024
DEFAULT_MAX_BYTES = 64 * 1024**3
BLOB_ID = re.compile(r"[0-9a-f]{64}")
_DOMAIN = b"manyhands blob v1"
_PARTS_AT_ONCE = 512  # systems take 1024 or more


def is_blob_id(text: str) -> bool:
    """Whether this is 64 lower-case hex digits: the only names that ever reach the file system."""
    return BLOB_ID.fullmatch(text) is not None


def chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


@dataclass(frozen=True)
class Manifest:
    """Size and chunk digests (32 bytes each); their number always fits the size. `blob` is the id."""

    size_bytes: int
    chunks: tuple[bytes, ...]

    @cached_property
    def blob(self) -> BlobId:
        head = _DOMAIN + self.size_bytes.to_bytes(8, "little") + len(self.chunks).to_bytes(8, "little")
        return hashlib.sha256(head + b"".join(self.chunks)).hexdigest()

    @property
    def ref(self) -> BlobRef:
        return BlobRef(blob=self.blob, size_bytes=self.size_bytes)

    def offset(self, index: int) -> int:
        """Where chunk `index` starts, in bytes."""
        return index * CHUNK_BYTES

    def length(self, index: int) -> int:
        """Bytes of chunk `index`. Raises BlobError when there is no such chunk."""
        if not 0 <= index < len(self.chunks):
            raise BlobError(f"blob {self.blob} has {len(self.chunks)} chunks: there is no chunk {index}.")
        return min(CHUNK_BYTES, self.size_bytes - index * CHUNK_BYTES)

    def fits(self, index: int, parts: Sequence[bytes | memoryview]) -> bool:
        """Whether these parts, one after the other, are chunk `index`."""
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return sum(map(len, parts)) == self.length(index) and digest.digest() == self.chunks[index]

    def to_json(self) -> bytes:
        """The canonical form: {"chunks":[hex, ...],"size":bytes}, sorted keys, no blanks."""
        value = {"chunks": [digest.hex() for digest in self.chunks], "size": self.size_bytes}
        return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, body: bytes, *, max_bytes: int = DEFAULT_MAX_BYTES) -> Manifest:
        """Read a manifest from a stranger. Raises BlobError for anything that is not exactly one, or too
        large."""
        if len(body) > max_manifest_bytes(max_bytes):
            raise BlobError(
                f"manifest of {len(body)} bytes: at most {max_manifest_bytes(max_bytes)} are read."
            )
        try:
            value = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise BlobError(f"manifest is not JSON ({type(error).__name__}).") from None
        if not isinstance(value, dict) or value.keys() != {"size", "chunks"}:
            raise BlobError("manifest must be an object of exactly 'size' and 'chunks'.")
        size, chunks = value["size"], value["chunks"]
        if type(size) is not int or not 0 <= size <= max_bytes:
            raise BlobError(
                f"manifest's size is {str(size)[:40]}: expected a whole number from 0 to {max_bytes}."
            )
        if not isinstance(chunks, list) or len(chunks) != chunk_count(size):
            raise BlobError(f"manifest of {size} bytes must list exactly {chunk_count(size)} chunks.")
        if not all(isinstance(chunk, str) and is_blob_id(chunk) for chunk in chunks):
            raise BlobError("manifest's chunks must be SHA-256 digests of 64 lower-case hex digits.")
        return cls(size, tuple(bytes.fromhex(chunk) for chunk in chunks))


def max_manifest_bytes(max_blob_bytes: int) -> int:
    """The longest canonical JSON of a manifest for at most so many bytes, with room for blanks and line
    breaks."""
    return 256 + 72 * chunk_count(max_blob_bytes)


# ------------------------------------------------------------------------------------------- of what is there
def manifest_of_bytes(data: bytes) -> Manifest:
    view = memoryview(data)
    starts = range(0, len(data), CHUNK_BYTES)
    return Manifest(
        len(data), tuple(hashlib.sha256(view[start : start + CHUNK_BYTES]).digest() for start in starts)
    )


def manifest_of(path: Path, threads: int | None = None) -> Manifest:
    """Hash a file, its chunks in parallel (hashing releases the GIL); threads: None for one per CPU, at most
    4.

    Blocks: call it in a thread. Raises BlobError when the file cannot be read, or shrinks meanwhile.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(descriptor).st_size
            return Manifest(size, tuple(_digests(descriptor, size, threads)))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BlobError(f"file '{path}' cannot be read as a blob ({error}).") from error


def matching_chunks(descriptor: int, manifest: Manifest, threads: int | None = None) -> set[int]:
    """Indices of the chunks that an open file already holds correctly; what lies past its end is just
    missing."""
    there = min(os.fstat(descriptor).st_size, manifest.size_bytes)
    digests = _digests(descriptor, there, threads)
    whole = [i for i in range(len(digests)) if manifest.offset(i) + manifest.length(i) <= there]
    return {i for i in whole if digests[i] == manifest.chunks[i]}


def _digests(descriptor: int, size: int, threads: int | None) -> list[bytes]:
    count = chunk_count(size)

    def digest(index: int) -> bytes:
        wanted = min(CHUNK_BYTES, size - index * CHUNK_BYTES)
        return hashlib.sha256(read_exactly(descriptor, wanted, index * CHUNK_BYTES)).digest()

    workers = min(threads or min(4, os.cpu_count() or 1), count)
    if workers <= 1:
        return [digest(index) for index in range(count)]
    with ThreadPoolExecutor(workers, thread_name_prefix="blob-hash") as pool:
        return list(pool.map(digest, range(count)))


def read_exactly(descriptor: int, count: int, offset: int) -> bytes:
    """pread without short reads. Raises OSError when the file ends before."""
    data = os.pread(descriptor, count, offset)
    while len(data) < count:
        more = os.pread(descriptor, count - len(data), offset + len(data))
        if not more:
            raise OSError(f"the file ends at byte {offset + len(data)}, {offset + count} were expected")
        data += more
    return data


def write_exactly(descriptor: int, parts: Sequence[bytes | memoryview], offset: int) -> None:
    """pwritev without short writes: all parts, one after the other, in as few calls as the system takes."""
    left = [memoryview(part) for part in parts]
    while left:
        written = os.pwritev(descriptor, left[:_PARTS_AT_ONCE], offset)
        offset += written
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if written:
            left[0] = left[0][written:]
