"""A consistent copy of the database while the server runs.

SQLite's own backup: the copy is the database as of one moment, writers are not held up (WAL), and it is
checked before it gets its name, so a file under that name is always a whole one.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from manyhands.errors import StorageError
from manyhands.storage.database import Database, translated
from manyhands.storage.durable import sync


def backup(database: Database, destination: Path) -> int:
    """Copy the open database to `destination`, which must not exist; returns its size in bytes. Raises
    StorageError.

    Written aside, checked, fsynced, then renamed. Restoring is copying it back while no server runs.
    """
    destination = destination.expanduser().absolute()
    if destination.exists():
        raise StorageError(
            f"backup '{destination}' exists already: give a new name, nothing was overwritten."
        )
    aside = destination.with_name(destination.name + ".partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.unlink(missing_ok=True)
            with translated(destination):
                _copy(database.path, aside)
            sync(aside)
            os.link(aside, destination)  # unlike rename, never replaces what has appeared meanwhile
        finally:
            aside.unlink(missing_ok=True)
        sync(destination.parent)
    except OSError as error:
        raise StorageError(f"backup '{destination}' could not be written ({error}).") from error
    return destination.stat().st_size


def _copy(source: Path, aside: Path) -> None:
    with closing(sqlite3.connect(source)) as origin, closing(sqlite3.connect(aside)) as copy:
        origin.execute("PRAGMA busy_timeout=10000")
        origin.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")  # one file, without -wal and -shm beside it
        verdict = copy.execute("PRAGMA quick_check").fetchone()[0]
        if verdict != "ok":
            raise StorageError(f"the copy of '{source}' is damaged ({verdict}): is the database itself?")
