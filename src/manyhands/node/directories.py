"""Where a participant keeps its files: `runs/<run id>/<server | first 8 hex digits of its key>/`.

One process at a time holds a directory (a lock that dies with it). Files are written aside, as `*.part`, and
renamed; what is left of those is swept when the directory is opened, but for half-fetched blobs.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from manyhands.errors import ManyhandsError


class ParticipantDirectory:
    """A locked directory. Raises ManyhandsError if another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self.path.mkdir(parents=True, exist_ok=True)
        lock = (self.path / "lock").open("a+")
        try:
            _lock_file(lock)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise ManyhandsError(
                f"{self.path} is in use by process {holder}, which does the same thing with the same files. "
                "Stop that process, or use another key (a client) or another directory (a server)."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        self._lock = lock
        for leftover in self.path.rglob("*.part"):
            if leftover.parent.name != "blobs":  # downloads go on where they were
                leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def sub(self, name: str) -> Path:
        """A directory inside, made if need be."""
        directory = self.path / name
        directory.mkdir(exist_ok=True)
        return directory


def _lock_file(file: IO[str]) -> None:
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
