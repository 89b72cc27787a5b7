"""Where the graphs of checkpoints lie in a run's directory, there as here."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from manyhands.config.checkpoint_names import TRAINING, numbered

DIRECTORY: Final = "exports"


def forget_exports(directory: Path) -> None:
    """Remove those of checkpoints that are not there any more, and what was left behind half-written."""
    kept = {checkpoint.name for checkpoint in numbered(directory / "checkpoints", TRAINING)}
    for file in (directory / DIRECTORY).glob(f"{TRAINING}-*.onnx*"):
        if file.name.partition(".")[0] not in kept:
            file.unlink(missing_ok=True)
    for file in (directory / DIRECTORY).glob(f".{TRAINING}-*.part*"):
        if file.name[1:].partition(".")[0] not in kept or ".partial-" in file.name:
            file.unlink(missing_ok=True)
