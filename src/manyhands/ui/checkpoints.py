"""Which checkpoint a command line means: a directory, a training's or a run's newest, or a run by its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manyhands.config import did_you_mean, home
from manyhands.errors import StorageError
from manyhands.ui.plans import training_of

_NAME: Final = re.compile(r"^(?:step|round)-(\d{8,})$")
_MARKS: Final = ("config.json", "adapter_config.json", "table.json", "training.json", "*.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """`checkpoint`: a directory as a task's save_pretrained fills it. `training`: that of the training it is from,
    with plan and materials, if it is from one."""

    checkpoint: Path
    training: Path | None


def locate(where: str) -> Found:
    """The checkpoint of that path, or the newest one of the training's or run's directory, or of the run so named.

    Raises StorageError for a name that is nothing here, and for a directory without checkpoints.
    """
    path = Path(where).expanduser()
    runs = home() / "runs"
    if not path.exists() and re.fullmatch(r"[a-z0-9-]{1,64}", where):
        path = runs / where
    if not path.is_dir():
        known = [run.name for run in runs.iterdir() if run.is_dir()] if runs.is_dir() else []
        raise StorageError(
            f"there is no directory {where!r}, and no run of that name in {runs}.{did_you_mean(where, known)}"
        )
    newest = _newest(path) or _newest(path / "checkpoints")
    if newest is None and not any(next(path.glob(mark), None) for mark in _MARKS):
        raise StorageError(
            f"no checkpoint in {path}: a directory step-<number> or round-<number>, or one that holds such, was "
            "expected"
        )
    checkpoint = newest or path
    return Found(checkpoint=checkpoint, training=training_of(str(checkpoint)))


def _newest(directory: Path) -> Path | None:
    """By number, not by name or date."""
    if not directory.is_dir():
        return None
    found = [(int(m[1]), p) for p in directory.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return max(found, default=(0, None))[1]
