"""A task's samples as shards: whatever `batch(indices, split)` gives, all of its sets, in parallel processes.

The training samples lie in the shards in the order of the seed's permutation, so that every part of them is a sample
of the whole, and reading in blocks (data/shards/order.py) mixes well; those of evaluation sets lie as they are. What
is kept beside them is what the task needs to be opened without its sources (tasks/protocol.py: KeepsDataApart).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from manyhands.data.permutation import permute
from manyhands.data.shards.claim import PREPARED, claimed
from manyhands.data.shards.making import Making, Progress, RowMaker, WantedSet, row_jobs
from manyhands.data.shards.manifest import (
    MAKING,
    MANIFEST,
    MATERIALS,
    Made,
    Manifest,
    Material,
    ShardSet,
    write_json,
)
from manyhands.data.shards.verify import sha256_of
from manyhands.data.shards.writer import Rows, arrow, columns_of
from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import TRAINING, ChecksPlan, KeepsDataApart, Task, TaskFamily
from manyhands.tasks.registry import family_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRows:
    """Opens a task in the process that makes its rows; implements data.shards.processes.Opens."""

    plan: Plan
    materials: Path
    allowed: tuple[str, ...]
    wanted: Mapping[str, WantedSet]

    def __call__(self) -> RowMaker:
        torch.set_num_threads(1)
        task = family_of(self.plan, allowed=self.allowed).open(self.plan, self.materials)
        return RowMaker(
            produce=lambda name, positions: rows_of(task, name, positions, self.plan.seed), wanted=self.wanted
        )


def rows_of(task: Task, name: str, positions: npt.NDArray[np.int64], seed: int) -> Rows:
    """The rows at these positions of a set's shards, by column [n, ...]."""
    indices = permute(positions, task.samples(), seed, 0) if name == TRAINING else positions
    return {column: tensor.numpy() for column, tensor in task.batch(indices, name).items()}


def pack(
    plan: Plan,
    directory: Path,
    *,
    rows: int | None = None,
    shard_rows: int | None = None,
    processes: int | None = None,
    allowed: Collection[str] = (),
    command: str = "manyhands.tasks.packing.pack",
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Make shards of the plan's task in `directory`, or go on with those that were begun there.

    `rows`: so many training samples, chosen by the seed; None: all. `shard_rows`: of each file; None: 65,536, or as
    many as fit into 256 MiB. `processes`: None: one for each core. Same plan, rows and shard_rows: same bytes of
    every shard. Raises DataError, PlanError, StorageError (the disk; what is made is kept), Refused, WorkerError,
    MissingExtra.
    """
    arrow()
    _check(plan, rows, shard_rows)
    directory = directory.expanduser().resolve()
    wanted = {
        "task": plan.task.model_dump(mode="json"), "seed": plan.seed, "rows": rows, "shard_rows": shard_rows
    }  # fmt: skip
    place = directory / MAKING
    with claimed(directory, wanted):
        family = family_of(plan, allowed=allowed)
        if isinstance(family, ChecksPlan):
            family.check(plan)
        first_weights, names = _prepared(family, plan, place)
        task = family.open(plan, place / MATERIALS)
        sizes = _wanted(task, plan.seed, rows, shard_rows)
        making = Making(directory=directory, jobs=row_jobs(sizes))
        making.find_done()
        opens = TaskRows(plan=plan, materials=place / MATERIALS, allowed=tuple(allowed), wanted=sizes)
        files = making.make(opens, processes=processes or os.cpu_count() or 1, on_progress=on_progress)
        sets = {
            name: ShardSet(columns=size.columns, group_rows=size.group_rows, files=files[name])
            for name, size in sizes.items()
        }
        manifest = _manifest(family, plan, directory, sets, first_weights, names, command)
        write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _check(plan: Plan, rows: int | None, shard_rows: int | None) -> None:
    if plan.data.shards is not None:
        raise PlanError(
            f"'data.shards' is {plan.data.shards!r}: shards are made of a task's own sources; leave it out"
        )
    if plan.task.name == "dummy":
        raise PlanError("'task.name' is 'dummy', which has no samples: choose another task")
    for what, value in (("rows", rows), ("rows of a shard", shard_rows)):
        if value is not None and value < 1:
            raise PlanError(f"{what}: {value}; expected 1 or more")


def _prepared(family: TaskFamily, plan: Plan, place: Path) -> tuple[str, list[str]]:
    """The task's materials, made once: the name of the first weights among them, and of the others."""
    mark, materials = place / PREPARED, place / MATERIALS
    if not mark.is_file():
        shutil.rmtree(materials, ignore_errors=True)
        prepared = family.prepare(plan, materials)
        write_json(mark, {"first": prepared.first_weights.name, "materials": sorted(prepared.materials)})
    values = json.loads(mark.read_text(encoding="utf-8"))
    return values["first"], values["materials"]


def _wanted(task: Task, seed: int, rows: int | None, shard_rows: int | None) -> dict[str, WantedSet]:
    total = task.samples()
    if rows is not None and rows > total:
        raise DataError(
            f"{rows:,} rows are asked for, and the task has {total:,} training samples: ask for fewer"
        )
    wanted = {}
    for name in (TRAINING, *task.evaluation_sets):
        first = rows_of(task, name, np.zeros(1, dtype=np.int64), seed)
        count = (rows or total) if name == TRAINING else task.samples(name)
        wanted[name] = WantedSet.of(count, columns_of(first, f"task, set {name!r}"), shard_rows)
    return wanted


def _manifest(
    family: TaskFamily,
    plan: Plan,
    directory: Path,
    sets: dict[str, ShardSet],
    first_weights: str,
    names: list[str],
    command: str,
) -> Manifest:
    """Keep the task's materials beside the shards, and say what is there."""
    source, kept = directory / MAKING / MATERIALS, directory / MATERIALS
    apart = isinstance(family, KeepsDataApart)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir()
    if isinstance(family, KeepsDataApart):
        family.without_data(plan, source, kept)
    else:
        for name in {*names, first_weights}:
            shutil.copyfile(source / name, kept / name)
    task = plan.task.model_dump(mode="json")
    made = Made(
        command=command,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        manyhands=version("manyhands"),
        seed=plan.seed,
        rows=sets[TRAINING].rows,
        task=task,
        sources={name: sha256_of(source / name) for name in names},
    )
    return Manifest(
        task=task,
        seed=plan.seed,
        sets=sets,
        first_weights=None if apart else first_weights,
        materials={file.name: _material(file) for file in sorted(kept.iterdir())},
        made=(made,),
    )


def _material(file: Path) -> Material:
    return Material(size_bytes=file.stat().st_size, sha256=sha256_of(file))
