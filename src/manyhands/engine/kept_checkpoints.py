"""The checkpoints of a training that are kept in a directory, and their records.

No torch here: commands look for checkpoints before they load it.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Final

from manyhands.config import differences, shown
from manyhands.config.checkpoint_names import TRAINING, number_of, numbered
from manyhands.errors import PlanError, Refused, StorageError
from manyhands.plan.resolve import PLAN_FILE, agreed, plan_hash, read_plan_file, resolve
from manyhands.plan.schema import Plan
from manyhands.storage.durable import write_whole

VERSION: Final = 2
RECORD: Final = "training.json"
LATEST: Final = "latest"
ASIDE: Final = "aside"
_TOLD: Final = 4
"""So many settings are named where two plans differ."""


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
        version, step, sample, made_with = (record[key] for key in ("version", "step", "sample", "plan_hash"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"checkpoint {path / RECORD}: {error}; {others_in_words(path)}") from error
    if version != VERSION:
        raise StorageError(
            f"checkpoint {path} has format version {version!r}, this program reads {VERSION}; update it"
        )
    if not (isinstance(step, int) and isinstance(sample, int) and isinstance(made_with, str)):
        raise StorageError(f"checkpoint {path / RECORD}: step, sample or plan_hash has the wrong type")
    return dict(record)


def check_plan_of(checkpoint: Path, plan: Plan) -> dict[str, Any]:
    """The record of a checkpoint. Raises Refused if it is of another plan, StorageError if it is broken."""
    record = record_of(checkpoint)
    check_made_with(checkpoint, record["plan_hash"], plan)
    return record


def check_made_with(checkpoint: Path, made_with: str, plan: Plan) -> None:
    """Raises Refused if a checkpoint, be it here or elsewhere, was made with a plan of another hash than `plan`."""
    if made_with != plan_hash(plan):
        raise Refused(
            f"checkpoint {checkpoint} belongs to another plan{_what_differs(checkpoint, made_with, plan)}: "
            "resume with the plan it was made with, or begin afresh, in another directory, from its weights "
            f"(task.weights={checkpoint}) or without"
        )


def _what_differs(checkpoint: Path, made_with: str, plan: Plan) -> str:
    """In words, if the plan that a checkpoint was made with is still beside it; else the two hashes."""
    other = kept_plan(checkpoint.resolve().parent.parent) or plan
    if plan_hash(other) != made_with:
        return f" ({made_with[:16]}..., this plan is {plan_hash(plan)[:16]}...)"
    here, there = (agreed(each).model_dump(mode="json") for each in (plan, other))
    told = [f"{path} is {shown(b)} there and {shown(a)} here" for path, a, b in differences(here, there)]
    more = f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else ""
    return f" ({'; '.join(told[:_TOLD])}{more})"


def kept_plan(directory: Path) -> Plan | None:
    """A training's, from its directory; None where it is missing or broken."""
    try:
        return resolve(read_plan_file(directory / PLAN_FILE), where=str(directory))
    except PlanError:
        return None


def point_to(directory: Path, name: str) -> None:
    write_whole(directory / LATEST, name + "\n")


def remove(path: Path) -> None:
    """Rename first: a kill in the middle must not leave half a directory under a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)
