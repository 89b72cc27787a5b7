"""Are shards still what they were when they were made? Every byte is read; nothing is decoded unless asked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from manyhands.data.shards.decoded import read_group
from manyhands.data.shards.manifest import MATERIALS, Column, Manifest, ShardFile, read_manifest
from manyhands.data.shards.reader import missing
from manyhands.data.shards.writer import crc32_of
from manyhands.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something that is not as the manifest says. `group`: the row group, None for all of the file or its footer."""

    file: str
    group: int | None
    what: str


def verify(directory: Path, *, on_progress: Callable[[int, int], None] | None = None) -> list[Fault]:
    """What is broken, in the order of the files; empty for sound shards. Raises DataError without a manifest.

    `on_progress(bytes read, bytes in all)`.
    """
    manifest = read_manifest(directory)
    total, done = size_of(manifest), 0
    faults: list[Fault] = []
    for part in manifest.sets.values():
        for file in part.files:
            faults += verify_file(directory, file, part.columns)
            done += file.size_bytes
            if on_progress is not None:
                on_progress(done, total)
    for name, material in manifest.materials.items():
        path = directory / MATERIALS / name
        if not path.is_file():
            faults.append(Fault(file=f"{MATERIALS}/{name}", group=None, what="it is missing"))
        elif sha256_of(path) != material.sha256:
            faults.append(Fault(file=f"{MATERIALS}/{name}", group=None, what="its hash is another"))
    return faults


def verify_file(directory: Path, file: ShardFile, columns: tuple[Column, ...]) -> list[Fault]:
    """What is wrong with one file: the row groups whose bytes changed, else whatever is."""
    fault = missing(directory, file)
    path = directory / file.name
    if fault is not None and not path.is_file():
        return [Fault(file=file.name, group=None, what=fault)]
    if fault is None and sha256_of(path) == file.sha256:
        return list(_undecodable(path, file, columns))
    with path.open("rb") as opened:
        changed = [
            Fault(file=file.name, group=i, what="its bytes are not those that were written")
            for i, group in enumerate(file.groups)
            if crc32_of(opened, group.start, group.size_bytes) != group.crc32
        ]
    what = fault or "its hash is another, but no row group changed: its header or footer did"
    return changed or [Fault(file=file.name, group=None, what=what)]


def _undecodable(path: Path, file: ShardFile, columns: tuple[Column, ...]) -> Iterator[Fault]:
    """The bytes are those of the manifest; is what they say too? One row group is enough to know."""
    try:
        read_group(path, columns, dict(file.stored), 0)
    except DataError as error:
        yield Fault(file=file.name, group=0, what=str(error))


def size_of(manifest: Manifest) -> int:
    """Bytes of all files with rows."""
    return sum(file.size_bytes for part in manifest.sets.values() for file in part.files)


def sha256_of(path: Path) -> str:
    """64 hex digits. Raises OSError."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
