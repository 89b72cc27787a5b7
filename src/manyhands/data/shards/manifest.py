"""The manifest of a directory of shards: what is in which file, and where it came from.

It is written last, beside the files that it names, so a directory with a manifest is whole. Row groups are named with
their bytes, which is how a broken file is told from a broken part of one without reading Parquet.

Everything in it is checked when it is read: a manifest may have come from elsewhere, and names in it become paths.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError, model_validator

from manyhands.config import Settings, differences, shown
from manyhands.config.faults import explain
from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import MODEL_SETTINGS
from manyhands.storage.durable import write_whole

MANIFEST: Final = "manifest.json"
MATERIALS: Final = "materials"
MAKING: Final = ".making"
TRAINING: Final = "training"
SUFFIX: Final = ".parquet"

_NARROW: Final = ("uint8", "int8", "uint16", "int16", "uint32", "int32")

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Kind = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32",
    "float64",
]  # fmt: skip


class Column(Settings):
    """One column: a row of it is `shape` values of `dtype`, as readers get it."""

    name: Name
    dtype: Kind
    shape: tuple[Count, ...] = ()

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


class Group(Settings):
    """A row group: its rows, and where its bytes are in the file."""

    rows: Count
    start: Size
    size_bytes: Count
    crc32: Size


class ShardFile(Settings):
    """One Parquet file. `stored`: by column, the dtype in which the file holds it: integers in as few bytes as their
    values need."""

    name: Name
    rows: Count
    size_bytes: Count
    sha256: Sha256
    stored: dict[str, Kind]
    groups: tuple[Group, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> ShardFile:
        if sum(group.rows for group in self.groups) != self.rows:
            raise ValueError(f"the row groups of {self.name} do not have its {self.rows} rows in all")
        return self


class ShardSet(Settings):
    """The rows of one set of the task, in the order of its files."""

    columns: Annotated[tuple[Column, ...], Field(min_length=1)]
    group_rows: Count
    files: Annotated[tuple[ShardFile, ...], Field(min_length=1)]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def stored(self) -> dict[str, np.dtype[Any]]:
        """By column, the narrowest dtype that holds what all files store."""
        return {
            column.name: np.result_type(*(np.dtype(file.stored[column.name]) for file in self.files))
            for column in self.columns
        }

    @model_validator(mode="after")
    def _files_fit(self) -> ShardSet:
        names = [column.name for column in self.columns]
        for file in self.files:
            if set(file.stored) != set(names):
                raise ValueError(f"{file.name} stores {sorted(file.stored)}, and the columns are {names}")
        return self


class Material(Settings):
    """A file of the task's own beside the rows."""

    size_bytes: Size
    sha256: Sha256


class Made(Settings):
    """How some of the rows were made: for people, and to find sources again."""

    command: str
    time: str
    manyhands: str
    seed: int
    rows: Count
    task: dict[str, Any]
    sources: dict[str, Any] = Field(default_factory=dict)


class Manifest(Settings):
    """All of a directory of shards."""

    format: Literal["manyhands shards"] = "manyhands shards"
    version: Literal[1] = 1
    task: dict[str, Any]
    seed: int
    sets: dict[Name, ShardSet]
    first_weights: Name | None = None
    """Among the materials: of a task whose model can only be had together with its data."""
    materials: dict[Name, Material] = Field(default_factory=dict)
    made: Annotated[tuple[Made, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_training(self) -> Manifest:
        if TRAINING not in self.sets:
            raise ValueError("there is no set 'training'")
        names = [file.name for part in self.sets.values() for file in part.files]
        if len(set(names)) < len(names):
            raise ValueError("a file is named twice")
        return self


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory of shards. Raises DataError for anything else."""
    file = directory / MANIFEST
    try:
        return Manifest.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(_what_instead(directory)) from None
    except OSError as error:
        raise DataError(f"shards {file}: {error.strerror or error}") from error
    except ValidationError as error:
        raise DataError(
            f"shards: {explain(error, Manifest, str(file))} It was written by another version of manyhands, or is "
            "broken: make the shards again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"shards {file} is broken: {error}; make the shards again") from error


def _what_instead(directory: Path) -> str:
    if not directory.is_dir():
        return f"shards {directory}: there is no such directory; `manyhands shards pack` makes one"
    if (directory / MAKING).is_dir():
        return (
            f"shards {directory} are not whole: they are being made, or that was interrupted; the command that made "
            "them goes on where it stopped"
        )
    if next(directory.glob("*.zst"), None) is not None:
        return (
            f"shards {directory}: no {MANIFEST}, but .zst files: if they are TPG files, import them with "
            f"`manyhands shards import {directory} --out DIR`"
        )
    return f"shards {directory}: no {MANIFEST} there; expected a directory that `manyhands shards` made"


def check_task(manifest: Manifest, plan: Plan, directory: Path) -> None:
    """Raises PlanError where the plan's task is not that of the shards; only its model may be another."""
    made = Plan.parse({"task": manifest.task}, where=str(directory / MANIFEST)).task
    free = MODEL_SETTINGS.get(made.name, frozenset())
    now, then = (task.model_dump(mode="json", exclude=set(free)) for task in (plan.task, made))
    for path, value, before in differences(now, then, "task"):
        raise PlanError(
            f"'{path}' is {shown(value)}, and the shards in {directory} were made with {shown(before)}: leave it "
            "out, or make other shards"
        )


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Durably: either the old file is there or the whole new one. Raises OSError."""
    write_whole(file, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def narrowed(values: npt.NDArray[Any]) -> np.dtype[Any]:
    """The narrowest integer dtype that holds these values; that of the values for other kinds."""
    if values.dtype.kind not in "iu" or not values.size:
        return values.dtype
    low, high = int(values.min()), int(values.max())
    for kind in _NARROW:
        dtype = np.dtype(kind)
        if dtype.itemsize >= values.dtype.itemsize:
            break
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return values.dtype
