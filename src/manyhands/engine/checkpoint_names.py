"""What checkpoints are called, and which is the newest: the one with the highest number, not by name or date.

No torch here: commands look for checkpoints before they load it.
"""

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


def numbered(directory: Path, *kinds: str) -> list[Path]:
    """The complete checkpoints of these kinds in a directory, the newest last; none where there is no directory."""
    if not directory.is_dir():
        return []
    found = ((p, _NAME.match(p.name)) for p in directory.iterdir() if p.is_dir())
    return sorted((p for p, match in found if match is not None and match[1] in kinds), key=number_of)
