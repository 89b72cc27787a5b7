"""Checkpoints: what a person keeps, and for a training on one machine also what exact resume needs.

    checkpoints/
        latest                      the name of the newest one, for people and scripts
        step-00000300/
            training.json           version, plan hash, step, data cursor, Python's and numpy's generators
            training.safetensors    weights/<parameter>, optimizer/<key>/<parameter>, generator/<device>
            ...                     the task's own form (language model: what transformers loads)
        round-00000012/             of a networked run: the task's own form of public after 12 closings

Invariants: a checkpoint is written aside, synced and renamed, so a directory named step-* or round-* is whole; a
kill at any moment loses at most the one being written. The newest is the one with the highest number, whatever
`latest` says. An older one is removed only after a newer one is complete. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manyhands.engine.optimizer import restore_state, state_of
from manyhands.engine.trainer import load_weights
from manyhands.errors import Refused, StorageError
from manyhands.tasks.protocol import Task

VERSION = 1
LATEST = "latest"
RECORD, TENSORS = "training.json", "training.safetensors"

_NAME = re.compile(r"^step-(\d{8,})$")
_PARTIAL = re.compile(r"^\.(step|round)-\d{8,}\.partial-\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a training stands. `sample` counts the samples drawn so far over all epochs."""

    step: int
    sample: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is saved and restored in place: model, optimizer, and the global generators beside them."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device


def save_checkpoint(
    directory: Path, training: Training, cursor: Cursor, *, plan_hash: str, task: Task, keep: int = 2
) -> Path:
    """Write the checkpoint of `cursor.step` below `directory`, then remove all but the newest `keep`.

    A checkpoint of that step which is already there is kept as it is: training is repeatable, so it is the
    same. Raises StorageError if the disk does not take it; what was there before is then untouched.
    """
    name = f"step-{cursor.step:08}"
    _write_aside(directory, name, lambda partial: _write(partial, training, cursor, plan_hash, task))
    for old in checkpoints(directory)[: -max(1, keep)]:
        _remove(old)
    return directory / name


def publish(task: Task, model: torch.nn.Module, directory: Path, round_number: int) -> Path:
    """Write what a person keeps of a networked run: the task's form of public after `round_number` closings.

    One that is already there is kept: public at a round never changes. Raises StorageError.
    """
    name = f"round-{round_number:08}"
    _write_aside(directory, name, lambda partial: task.save_pretrained(weights_of(model), partial))
    return directory / name


def _write_aside(directory: Path, name: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a directory that then appears at once under `name`, and point `latest` to it."""
    partial = directory / f".{name}.partial-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _sweep(directory)
        if not (directory / name).is_dir():
            partial.mkdir()
            write(partial)
            for file in sorted(partial.rglob("*")):
                _sync(file)
            _sync(partial)
            partial.rename(directory / name)
            _sync(directory)
        _point_to(directory, name)
    except (OSError, SafetensorError) as error:  # a full disk meets the one or the other
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"checkpoint {directory / name}: {error}; free space and try again") from error


def load_checkpoint(path: Path, training: Training, *, plan_hash: str) -> Cursor:
    """Restore model, optimizer and generators from a checkpoint, to the last bit.

    `path` is a checkpoint or a directory of them (then the newest). Raises StorageError for one that is
    missing or broken, Refused for one of another plan; the model may then be partly overwritten, the files
    never are.
    """
    path = find_checkpoint(path)
    record = _record(path)
    if record["plan_hash"] != plan_hash:
        raise Refused(
            f"checkpoint {path} belongs to plan {record['plan_hash'][:16]}..., this plan is {plan_hash[:16]}...: "
            "resume with the plan it was made with, or start afresh in another directory"
        )
    try:
        tensors = load_file(path / TENSORS)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"checkpoint {path / TENSORS}: {error}; resume from another checkpoint") from error
    load_weights(training.model, _below(tensors, "weights/"))
    restore_state(training.optimizer, training.model, _below(tensors, "optimizer/"))
    _restore_generators(record, _below(tensors, "generator/"), training.device)
    return Cursor(step=record["step"], sample=record["sample"])


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, by step, the newest last."""
    if not directory.is_dir():
        return []
    found = [(int(m[1]), p) for p in directory.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


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


def _write(partial: Path, training: Training, cursor: Cursor, plan_hash: str, task: Task) -> None:
    kept = weights_of(training.model)
    task.save_pretrained(kept, partial)
    weights = {f"weights/{name}": tensor for name, tensor in kept.items()}
    optimizer = {f"optimizer/{n}": t for n, t in state_of(training.optimizer, training.model).items()}
    generators = {"generator/cpu": torch.get_rng_state()}
    if training.device.type == "cuda":
        generators["generator/cuda"] = torch.cuda.get_rng_state(training.device)
    save_file({**weights, **optimizer, **generators}, partial / TENSORS)
    numpy_name, numpy_keys, *numpy_rest = np.random.get_state(legacy=True)
    record = {
        "version": VERSION,
        "plan_hash": plan_hash,
        "step": cursor.step,
        "sample": cursor.sample,
        "python_generator": random.getstate(),
        "numpy_generator": [numpy_name, np.asarray(numpy_keys).tolist(), *numpy_rest],
    }
    (partial / RECORD).write_text(json.dumps(record, sort_keys=True) + "\n", encoding="utf-8")


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, on the CPU; not copied where they are there already."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        version, step, sample, plan_hash = (record[key] for key in ("version", "step", "sample", "plan_hash"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"checkpoint {path / RECORD}: {error}; resume from another checkpoint") from error
    if version != VERSION:
        raise StorageError(
            f"checkpoint {path} has format version {version!r}, this program reads {VERSION}; update it"
        )
    if not (isinstance(step, int) and isinstance(sample, int) and isinstance(plan_hash, str)):
        raise StorageError(f"checkpoint {path / RECORD}: step, sample or plan_hash has the wrong type")
    return dict(record)


def _restore_generators(
    record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> None:
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    version, state, gauss = record["python_generator"]
    random.setstate((version, tuple(state), gauss))
    name, keys, *rest = record["numpy_generator"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def _below(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _point_to(directory: Path, name: str) -> None:
    aside = directory / f".{LATEST}.partial"
    aside.write_text(name + "\n", encoding="utf-8")
    _sync(aside)
    aside.replace(directory / LATEST)
    _sync(directory)


def _remove(path: Path) -> None:
    """Rename first: a kill in the middle must not leave half a directory under a checkpoint's name."""
    doomed = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _sweep(directory: Path) -> None:
    """Remove what a killed save left behind. Only one process trains in a directory."""
    for entry in directory.iterdir():
        if _PARTIAL.match(entry.name):
            shutil.rmtree(entry)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
