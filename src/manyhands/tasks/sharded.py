"""A task whose samples are read from shards; everything else is the task's own.

    shards.json    among the materials: which directory, the hash of its manifest, which files were left out and why

`open` holds the shards to that record, so that a training that goes on reads the rows that it began with. With
`data.on_broken: skip` every file is verified when the task is prepared, once, and not when it is read: all processes
of a training, and all that go on with it, then count the same rows.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.shards.manifest import (
    MANIFEST,
    MATERIALS,
    Manifest,
    check_task,
    read_manifest,
    write_json,
)
from manyhands.data.shards.reader import Shards
from manyhands.data.shards.verify import Fault, sha256_of, verify
from manyhands.errors import DataError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import (
    TRAINING,
    Batch,
    ChecksPlan,
    KeepsDataApart,
    LoadsSaved,
    Loss,
    Metrics,
    Prepared,
    Task,
    TaskFamily,
)

RECORD: Final = "shards.json"


class ShardedFamily:
    """How a task is prepared and opened over shards; implements tasks.protocol.TaskFamily."""

    def __init__(self, family: TaskFamily) -> None:
        self._family = family
        if isinstance(family, LoadsSaved):  # a checkpoint does not know where its samples came from
            self.load_saved = family.load_saved

    def check(self, plan: Plan) -> None:
        """Raises PlanError for a task that is not that of the shards, DataError for what are none."""
        directory = _directory(plan)
        check_task(read_manifest(directory), plan, directory)
        if isinstance(self._family, ChecksPlan):
            self._family.check(plan)

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Take over the materials beside the shards, and write those of the plan's model, the first weights and the
        record into `directory`. Raises DataError, PlanError.
        """
        shards = _directory(plan)
        manifest = read_manifest(shards)
        check_task(manifest, plan, shards)
        directory.mkdir(parents=True, exist_ok=True)
        for name, material in manifest.materials.items():
            _take(shards / MATERIALS / name, directory / name, material.sha256)
        faults = _broken(shards) if plan.data.on_broken == "skip" else []
        record = {
            "version": 1,
            "directory": str(shards),
            "manifest_sha256": sha256_of(shards / MANIFEST),
            "broken": {
                "count": len({fault.file for fault in faults}),
                "named": [{"file": f.file, "group": f.group, "what": f.what} for f in faults],
            },
        }
        write_json(directory / RECORD, record)
        opened = _opened(record, plan)
        prepared = self._prepare_model(plan, manifest, directory)
        return Prepared(
            materials={**prepared.materials, RECORD: directory / RECORD},
            samples=len(opened),
            parameters=prepared.parameters,
            first_weights=prepared.first_weights,
        )

    def _prepare_model(self, plan: Plan, manifest: Manifest, directory: Path) -> Prepared:
        if isinstance(self._family, KeepsDataApart):
            return self._family.prepare_model(plan, directory)
        if manifest.first_weights is None:
            raise DataError(
                f"{_directory(plan) / MANIFEST} names no first weights, which shards of such a task have: "
                "pack them again"
            )
        model = self._family.open(plan, directory).build_model()
        return Prepared(
            materials={n: directory / n for n in manifest.materials if n != manifest.first_weights},
            samples=0,
            parameters=tuple(
                Parameter(name=name, shape=tuple(p.shape), trainable=p.requires_grad)
                for name, p in model.named_parameters()
            ),
            first_weights=directory / manifest.first_weights,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over its materials and the shards that the record names. Raises DataError where they are gone or
        others.
        """
        record, shards = _recorded(plan, materials)
        return ShardedTask(self._family.open(plan, materials), shards, _warnings(record))


def check_prepared(plan: Plan, materials: Path) -> None:
    """Raises DataError where the plan's shards are not those that these materials were prepared over."""
    _recorded(plan, materials)


class ShardedTask:
    """Implements tasks.protocol.Task, OrdersSamples and Warns."""

    def __init__(self, task: Task, shards: Shards, warnings: tuple[str, ...] = ()) -> None:
        self._task, self.shards, self.warnings = task, shards, warnings
        self.unit, self.evaluation_sets = task.unit, task.evaluation_sets

    def samples(self, split: str = TRAINING) -> int:
        return self.shards.samples(split)

    def batch(self, indices: npt.NDArray[np.int64], split: str = TRAINING) -> Batch:
        """The rows `indices` of a set, as the task made them. Raises DataError for a broken shard."""
        return {name: torch.from_numpy(rows) for name, rows in self.shards.rows(indices, split).items()}

    def order(self, positions: npt.NDArray[np.int64], seed: int, epoch: int) -> npt.NDArray[np.int64]:
        return self.shards.order(positions, seed, epoch)

    def build_model(self) -> torch.nn.Module:
        return self._task.build_model()

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        return self._task.loss(model, batch)

    def metrics(self, split: str) -> Metrics:
        return self._task.metrics(split)

    def tokens_per_sample(self) -> int:
        return self._task.tokens_per_sample()

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        self._task.save_pretrained(weights, directory)


def _directory(plan: Plan) -> Path:
    assert plan.data.shards is not None, "tasks/registry.py"
    return Path(plan.data.shards).expanduser().resolve()


def _recorded(plan: Plan, materials: Path) -> tuple[dict[str, Any], Shards]:
    try:
        record = json.loads((materials / RECORD).read_text(encoding="utf-8"))
        return record, _opened(record, plan)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"material {materials / RECORD}: {error!r}; prepare the task again") from error


def _opened(record: Mapping[str, Any], plan: Plan) -> Shards:
    """Where the plan says; where that is no directory, or one that a relative path means here, also where they were
    when the task was prepared. Raises DataError.
    """
    left_out = {str(fault["file"]) for fault in record["broken"]["named"]}
    places = [_directory(plan)]
    if not (places[0].is_dir() and Path(str(plan.data.shards)).expanduser().is_absolute()):
        places.append(Path(record["directory"]))
    there = [place for place in places if (place / MANIFEST).is_file()]
    if not there:
        raise DataError(
            f"the shards that this task was prepared over are not in {places[0]}, and evaluation sets lie in them "
            "too: put them there again, or say where they are (--shards DIR)"
        )
    same = [place for place in there if sha256_of(place / MANIFEST) == record["manifest_sha256"]]
    if not same:
        raise DataError(
            f"the shards in {there[0]} are others than when this training was prepared: put those back, say where "
            "they are (--shards DIR), or start a new training"
        )
    return Shards.open(same[0], left_out)


def _warnings(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What was left out, once and in a sentence."""
    broken = record["broken"]
    if not broken["count"]:
        return ()
    files = list(dict.fromkeys(fault["file"] for fault in broken["named"]))
    return (
        f"{broken['count']} broken shards in {record['directory']} are left out: {', '.join(files[:5])}"
        + (", ..." if len(files) > 5 else "")
        + f"; {RECORD} among the materials names them all",
    )


def _take(source: Path, target: Path, sha256: str) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise DataError(f"shards: {source}: {error.strerror or error}; make the shards again") from error
    if sha256_of(target) != sha256:
        raise DataError(f"shards: {source} is not what the manifest says: make the shards again")


def _broken(shards: Path) -> list[Fault]:
    """What verify finds; of the rows alone, since materials have been checked."""
    return [fault for fault in verify(shards) if not fault.file.startswith(f"{MATERIALS}/")]
