"""Several directories of shards as one: their files, linked or copied, under new numbers and one manifest.

What is in them must be of one kind: the same columns, the same settings of the task but those that say how much and
from where (`FREE`), the same materials. The same rows twice are refused where that can be known. Every file is
compared with its hash on the way, so what is broken is not spread.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Final

from manyhands.config import differences, shown
from manyhands.data.shards.claim import claimed
from manyhands.data.shards.manifest import (
    MANIFEST,
    MATERIALS,
    SUFFIX,
    TRAINING,
    Manifest,
    ShardFile,
    ShardSet,
    read_manifest,
    write_json,
)
from manyhands.data.shards.verify import size_of, verify_file
from manyhands.errors import DataError
from manyhands.plan.tasks import MODEL_SETTINGS
from manyhands.storage.durable import sync

FREE: Final[Mapping[str, tuple[frozenset[str], frozenset[str]]]] = {
    "language_model": (
        frozenset({"text"}),
        frozenset({"split.json", "model.json", "train.tokens", "validation.tokens"}),
    ),
    "chess_endgames": (frozenset({"positions", "syzygy"}), frozenset({"endgames.json"})),
}
"""name of the task -> settings that may differ, and materials that then do."""

FROM_SEED: Final = frozenset({"chess_endgames", "custom"})
"""Tasks whose samples the seed makes: with another one they are others."""


def merge(
    sources: Sequence[Path], directory: Path, *, on_progress: Callable[[int, int], None] | None = None
) -> Manifest:
    """Make `directory` of the shards of all sources. Again after a kill: it begins anew. `on_progress(bytes, of)`.

    Training rows follow each other in the order of the sources; a file of an evaluation set that several have is kept
    once. Raises DataError for shards that do not go together or are broken, StorageError.
    """
    opened = {source: read_manifest(source) for source in sources}
    if len(opened) < 2:
        raise DataError("merge: give at least two different directories of shards")
    _check_alike(opened)
    with claimed(directory, {"merge": [str(source.resolve()) for source in sources]}):
        for left in directory.glob(f"*{SUFFIX}"):
            left.unlink()
        sets = dict(_sets(opened, directory, on_progress))
        first, manifest = next(iter(opened.items()))
        if manifest.materials:
            shutil.copytree(first / MATERIALS, directory / MATERIALS, dirs_exist_ok=True)
        task = dict(manifest.task)
        if "positions" in task:
            task["positions"] = sets[TRAINING].rows
        made = tuple(entry for each in opened.values() for entry in each.made)
        merged = manifest.model_copy(update={"task": task, "sets": sets, "made": made})
        sync(directory)
        write_json(directory / MANIFEST, merged.model_dump(mode="json"))
    return merged


def _check_alike(opened: Mapping[Path, Manifest]) -> None:
    (first, one), *others = opened.items()
    for other, two in others:
        for path, theirs, ours in differences(_kind(two), _kind(one)):
            raise DataError(
                f"merge: {path} is {shown(theirs)} in {other} and {shown(ours)} in {first}: only shards of the same "
                "kind can be one"
            )
    for (a, one), (b, two) in combinations(opened.items(), 2):
        same_rows = any(
            _source(x.task) == _source(y.task) and (x.seed == y.seed or x.task["name"] not in FROM_SEED)
            for x in one.made
            for y in two.made
        )
        if same_rows:
            raise DataError(
                f"merge: {a} and {b} hold the same rows: they were made from the same source"
                + (" with the same seed; give one of them another" if one.task["name"] in FROM_SEED else "")
            )


def _kind(manifest: Manifest) -> dict[str, Any]:
    """What must be the same in shards that become one."""
    settings, materials = FREE.get(manifest.task["name"], (frozenset(), frozenset()))
    unlike = settings | MODEL_SETTINGS.get(manifest.task["name"], frozenset())
    return {
        "task": {key: value for key, value in manifest.task.items() if key not in unlike},
        "columns": {name: [str(c) for c in part.columns] for name, part in manifest.sets.items()},
        "materials": {
            name: material.sha256 for name, material in manifest.materials.items() if name not in materials
        },
    }


def _source(task: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say which rows there are, without how many and with which model."""
    without = {"positions", "syzygy"} | MODEL_SETTINGS.get(task["name"], frozenset())
    return {key: value for key, value in task.items() if key not in without}


def _sets(
    opened: Mapping[Path, Manifest], directory: Path, on_progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, ShardSet]]:
    total, done = sum(size_of(manifest) for manifest in opened.values()), 0
    for name, part in next(iter(opened.values())).sets.items():
        files: dict[str, ShardFile] = {}  # by hash
        for source, manifest in opened.items():
            for file in manifest.sets[name].files:
                if name == TRAINING and file.sha256 in files:
                    raise DataError(
                        f"merge: {source / file.name} holds the same rows as another of these shards"
                    )
                if file.sha256 not in files:
                    number = f"{name}-{len(files):05}{SUFFIX}"
                    _take(source, file, manifest.sets[name], directory / number)
                    files[file.sha256] = file.model_copy(update={"name": number})
                done += file.size_bytes
                if on_progress is not None:
                    on_progress(done, total)
        rows = max(manifest.sets[name].group_rows for manifest in opened.values())
        yield name, ShardSet(columns=part.columns, group_rows=rows, files=tuple(files.values()))


def _take(source: Path, file: ShardFile, part: ShardSet, target: Path) -> None:
    """A link where both are on one file system, else a copy."""
    faults = verify_file(source, file, part.columns)
    if faults:
        group = "" if faults[0].group is None else f", row group {faults[0].group}"
        raise DataError(
            f"merge: {source / file.name}{group} is broken: {faults[0].what}; make those shards again"
        )
    try:
        os.link(source / file.name, target)
    except OSError:
        shutil.copyfile(source / file.name, target)
        sync(target)
