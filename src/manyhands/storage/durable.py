"""Making files and names last through a power cut: the one way in which this house asks the disk for it."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK_BYTES = 1 << 16


def end_with_a_whole_line(path: Path) -> None:
    """Cut off the half line that a kill has left at the end of a file of lines, so that nothing is glued to it.

    A file that is not there stays so. Raises OSError.
    """
    if not path.is_file():
        return
    with path.open("r+b") as file:
        end = whole = file.seek(0, os.SEEK_END)
        while whole > 0:
            start = max(0, whole - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(whole - start).rfind(b"\n")
            whole = start + found + 1
            if found >= 0:
                break
        if whole < end:
            file.truncate(whole)


def sync(path: Path) -> None:
    """What is in this file, or which names are in this directory, is on disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replace a file, durably: after a crash at any moment it is the old one or the new one, whole. Raises OSError.

    One writer at a time for a path; what another has left behind half-written is written over.
    """
    aside = path.with_name(f".{path.name}.part")
    with aside.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    sync(path.parent)
