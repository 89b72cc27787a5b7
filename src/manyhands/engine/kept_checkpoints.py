"""The checkpoints of a training that are kept in a directory, and their records.

No torch here: commands look for checkpoints before they load it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from manyhands.config.checkpoint_names import TRAINING, number_of, numbered
from manyhands.errors import StorageError
from manyhands.storage.durable import write_whole

VERSION: Final = 2
RECORD: Final = "training.json"
LATEST: Final = "latest"
ASIDE: Final = "aside"


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, by step, the newest last."""
    return numbered(directory, TRAINING)


def newest_in_words(directory: Path) -> str:
    """For a training that cannot go on."""
    found = checkpoints(directory)
    return f"the newest checkpoint is {found[-1]}" if found else "no checkpoint is kept yet"


def others_in_words(broken: Path) -> str:
    """What to go on from where this one cannot be."""
    others = [str(path) for path in checkpoints(broken.parent) if path.name != broken.name]
    return (
        f"resume from {' or '.join(reversed(others))}"
        if others
        else "there is no other beside it: start afresh"
    )


def set_aside(directory: Path, gone_on_from: Path, step: int) -> list[Path]:
    """Move the checkpoints of `step` and later into `aside/`, but for `gone_on_from`; where they are then.

    They are of a course that was left: the newest would be one of theirs. Raises StorageError.
    """
    origin = gone_on_from.resolve()
    others = [path for path in checkpoints(directory) if number_of(path) >= step and path.resolve() != origin]
    moved = []
    try:
        for path in others:
            place = directory / ASIDE / path.name
            place.parent.mkdir(exist_ok=True)
            if place.exists():
                remove(place)
            path.rename(place)
            moved.append(place)
        if moved:
            left = checkpoints(directory)
            point_to(directory, left[-1].name) if left else (directory / LATEST).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"checkpoint {path}: {error}; move it elsewhere by hand") from error
    return moved


def find_checkpoint(path: Path) -> Path:
    """`path` if it is a checkpoint, else the newest one in it or in its `checkpoints/`. Raises
    StorageError.
    """
    if (path / RECORD).is_file():
        return path
    for directory in (path, path / "checkpoints"):
        if found := checkpoints(directory):
            return found[-1]
    raise StorageError(
        f"no checkpoint in {path}: a directory step-<number>, or one that holds such, was expected"
    )


def record_of(path: Path) -> dict[str, Any]:
    """What a training's checkpoint says of itself (training.json). Raises StorageError if it is broken."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        version, step, sample, plan_hash = (record[key] for key in ("version", "step", "sample", "plan_hash"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"checkpoint {path / RECORD}: {error}; {others_in_words(path)}") from error
    if version != VERSION:
        raise StorageError(
            f"checkpoint {path} has format version {version!r}, this program reads {VERSION}; update it"
        )
    if not (isinstance(step, int) and isinstance(sample, int) and isinstance(plan_hash, str)):
        raise StorageError(f"checkpoint {path / RECORD}: step, sample or plan_hash has the wrong type")
    return dict(record)


def point_to(directory: Path, name: str) -> None:
    write_whole(directory / LATEST, name + "\n")


def remove(path: Path) -> None:
    """Rename first: a kill in the middle must not leave half a directory under a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)
