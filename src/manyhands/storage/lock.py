"""Who uses a directory: a lock that dies with its process, and names it to those who come in vain."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

from manyhands.errors import Refused


def take_lock(directory: Path, what_to_do: str) -> IO[str]:
    """Hold `directory` until the returned file is closed, or this process ends.

    Raises Refused with the other process's number and `what_to_do`, where one holds it already.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / "lock").open("a+")
    try:
        _lock_file(lock)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise Refused(f"{directory} is in use by process {holder}. {what_to_do}") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _lock_file(file: IO[str]) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
