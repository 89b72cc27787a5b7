"""Who may make shards in a directory: a new one, or one in which the same was begun.

DIR/.making/wanted.json    what was asked for
DIR/.making/prepared.json  written when the maker of rows has prepared what it needs
DIR/.making/done.jsonl     making.py: what is made
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from manyhands.config import shown
from manyhands.data.shards.manifest import MAKING, MANIFEST, differences, write_json
from manyhands.errors import DataError, StorageError

WANTED: Final = "wanted.json"
RECORD: Final = "done.jsonl"
PREPARED: Final = "prepared.json"


def claim(directory: Path, wanted: Mapping[str, Any]) -> None:
    """Take a directory for shards: a new one, an empty one, or one in which the same was begun, or nothing made yet.

    `wanted`: what is asked for, as plain data. Raises DataError for a directory that holds something else,
    StorageError for one that cannot be written.
    """
    _check_place(directory)
    place, values = directory / MAKING, json.loads(json.dumps(wanted))
    file = place / WANTED
    if file.is_file() and not _same_wish(values, file, directory):
        shutil.rmtree(place)
        place.mkdir()
    if not file.is_file():
        write_json(file, values)


def give_up(directory: Path) -> None:
    """Leave nothing of a claim behind, unless something was made."""
    if not any((directory / MAKING / name).exists() for name in (RECORD, PREPARED)):
        shutil.rmtree(directory / MAKING, ignore_errors=True)
        with suppress(OSError):
            directory.rmdir()


def _same_wish(values: Mapping[str, Any], file: Path, directory: Path) -> bool:
    """Raises DataError for another wish, if some of the old one is made."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # cut by a kill, so nothing is made
        return False
    made = file.with_name(RECORD)
    for path, now, then in differences(values, before):
        if not made.is_file():
            return False
        raise DataError(
            f"{directory} holds shards that are half made, with {path} {shown(then)}, and now it is {shown(now)}: "
            "repeat the command that began them, choose another directory, or remove this one"
        )
    return True


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
