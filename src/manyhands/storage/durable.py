"""Making files and names last through a power cut: the one way in which this house asks the disk for it."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """What is in this file, or which names are in this directory, is on disk when this returns. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
