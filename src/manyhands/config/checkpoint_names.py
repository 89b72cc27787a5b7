"""What checkpoints are called, and which is the newest: the one with the highest number, not by name or date."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

TRAINING, RUN = "step", "round"
"""The kinds: of a training, by steps; of a networked run, by closings."""
_NAME: Final = re.compile(rf"^({TRAINING}|{RUN})-(\d{{8,}})$")


def name_of(kind: str, number: int) -> str:
    return f"{kind}-{number:08}"


def number_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_name(text: str, *kinds: str) -> bool:
    """Whether a checkpoint of one of these kinds can be called so."""
    match = _NAME.match(text)
    return match is not None and match[1] in kinds


def numbered(directory: Path, *kinds: str) -> list[Path]:
    """The complete checkpoints of these kinds in a directory, the newest last; none where there is no directory."""
    if not directory.is_dir():
        return []
    found = (p for p in directory.iterdir() if is_name(p.name, *kinds) and p.is_dir())
    return sorted(found, key=number_of)
