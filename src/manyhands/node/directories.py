"""Where a participant keeps its files: `runs/<run id>/<server | first 8 hex digits of its key>/`.

One process at a time holds a directory (a lock that dies with it). Files are written aside, as `*.part`, and
renamed; what is left of those is swept when the directory is opened, but for half-fetched blobs.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from manyhands.storage.lock import take_lock


class ParticipantDirectory:
    """A locked directory. Raises Refused if another process holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        self._lock = take_lock(
            self.path,
            "It does the same thing with the same files: stop it, or use another key (a client) or another directory "
            "(a server).",
        )
        for leftover in self.path.rglob("*.part"):
            if leftover.parent.name != "blobs":  # downloads go on where they were
                leftover.unlink()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def remove(self) -> None:
        """The directory with all that is in it, and that of the run if nothing else is there. The lock stays held."""
        shutil.rmtree(self.path)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()

    def sub(self, name: str) -> Path:
        """A directory inside, made if need be."""
        directory = self.path / name
        directory.mkdir(exist_ok=True)
        return directory
