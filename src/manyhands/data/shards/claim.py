"""Who may make shards in a directory: a new one, or one in which the same was begun.

DIR/.making/wanted.json    what was asked for
DIR/.making/prepared.json  written when the maker of rows has prepared what it needs
DIR/.making/done.jsonl     making.py: what is made
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from manyhands.config import differences, shown
from manyhands.data.shards.manifest import MAKING, MANIFEST, SUFFIX, write_json
from manyhands.errors import DataError, StorageError
from manyhands.storage.lock import take_lock

WANTED: Final = "wanted.json"
RECORD: Final = "done.jsonl"
PREPARED: Final = "prepared.json"


@contextmanager
def claimed(directory: Path, wanted: Mapping[str, Any]) -> Iterator[None]:
    """Hold a directory while shards are made in it: a new one, an empty one, or one in which the same was begun, or
    nothing made yet. When it ends well .making goes; else it stays, unless nothing was made.

    `wanted`: what is asked for, as plain data; other versions of what makes the bytes are another wish. Raises
    DataError for a directory that holds something else, StorageError for one that cannot be written, also meanwhile,
    Refused where another process makes shards.
    """
    _check_place(directory)
    place = directory / MAKING
    values = json.loads(json.dumps({**wanted, "versions": {n: version(n) for n in ("manyhands", "pyarrow")}}))
    with take_lock(place, "Shards are being made there: wait for their end, or choose another directory."):
        try:
            if not _same_wish(values, place / WANTED, directory):
                for left in place.iterdir():
                    if left.is_dir():
                        shutil.rmtree(left)
                    elif left.name != "lock":
                        left.unlink()
                write_json(place / WANTED, values)
            yield
        except BaseException as error:
            begun = _has_made(place) or (place / PREPARED).exists()
            if not begun and list(directory.iterdir()) == [place]:
                shutil.rmtree(place, ignore_errors=True)
                with suppress(OSError):
                    directory.rmdir()
            if isinstance(error, OSError):
                raise StorageError(
                    f"{directory}: {error.strerror or error}; what is made is kept, and the same command goes on"
                ) from error
            raise
    shutil.rmtree(place)


def _same_wish(values: Mapping[str, Any], file: Path, directory: Path) -> bool:
    """Whether this was begun. Raises DataError for another wish of which some is made."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # or cut by a kill, so nothing is made
        return False
    for path, now, then in differences(values, before):
        if not _has_made(file.parent):
            return False
        raise DataError(
            f"{directory} holds shards that are half made, with {path} {shown(then)}, and now it is {shown(now)}: "
            "repeat the command that began them, choose another directory, or remove this one"
        )
    return True


def _has_made(place: Path) -> bool:
    """Whether there is a shard: of a job in the record, or of one that was cut off just before its line."""
    record = place / RECORD
    recorded = record.is_file() and record.stat().st_size > 0
    return recorded or next(place.parent.glob(f"*{SUFFIX}"), None) is not None


def _check_place(directory: Path) -> None:
    """Raises DataError for a directory in which shards cannot be made: it holds something else, or is read-only."""
    if (directory / MANIFEST).is_file():
        shutil.rmtree(directory / MAKING, ignore_errors=True)  # left by a kill behind the last step
        raise DataError(
            f"{directory} holds shards already (`manyhands shards info {directory}`): choose another directory"
        )
    found = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    if found and MAKING not in found:
        raise DataError(f"{directory} is not empty ({min(found)}): choose a new directory for the shards")
    try:
        (directory / MAKING).mkdir(parents=True, exist_ok=True)
        probe = directory / MAKING / f"probe.{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write into {directory}: {error.strerror or error}; choose another directory"
        ) from error
