"""TPG files that exist as shards of the task chess_endgames: the same records, in another container.

Each file is a job (data/shards/making.py): it becomes `training-<number>-<part>` and, of the positions that the task
holds out by their hash, `validation-<number>-<part>`. So what is evaluated on is in no training shard, of these files
or of any others. Which pieces there are is read from the positions. How a record is converted, and what is lost, is
said in tasks/chess_endgames/tpg.py: the value is the result of the game, and distances are not known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from manyhands.data.shards.claim import claimed
from manyhands.data.shards.decoded import read_group
from manyhands.data.shards.making import Making, Progress, WantedSet, put_shard
from manyhands.data.shards.manifest import (
    MANIFEST,
    MATERIALS,
    SUFFIX,
    TRAINING,
    Column,
    Made,
    Manifest,
    Material,
    ShardFile,
    ShardSet,
    write_json,
)
from manyhands.data.shards.processes import Job
from manyhands.data.shards.processes import Made as MadeShards
from manyhands.data.shards.verify import sha256_of
from manyhands.data.shards.writer import Rows, arrow
from manyhands.errors import DataError
from manyhands.plan.chess_endgames import ChessEndgamesTask
from manyhands.tasks.chess_endgames.pieces import MOST_MEN, ending, parse
from manyhands.tasks.chess_endgames.record import by_pieces
from manyhands.tasks.chess_endgames.task import RECORD, is_held_out
from manyhands.tasks.chess_endgames.tpg import COLUMNS, RECORD_BYTES, read_tpg
from manyhands.tasks.protocol import VALIDATION

_COLUMNS: Final = tuple(Column(name=n, dtype=d.name, shape=s) for n, d, s in COLUMNS)
_SIZES: Final = WantedSet.of(1, _COLUMNS)
LEFT_OUT: Final = "left_out"
"""In the manifest: how many positions of the files are no endings of the task."""
_HELD_OUT: Final[float] = ChessEndgamesTask.model_fields["held_out"].default


def import_tpg(
    sources: Sequence[Path],
    directory: Path,
    *,
    processes: int | None = None,
    command: str = "manyhands.tasks.tpg_shards.import_tpg",
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Make shards in `directory` of TPG files, or of all .zst files in directories; or go on where that stopped.

    Positions with castling rights or more pieces than endings have are left out, and counted in the manifest. Raises
    DataError for files that are no TPG files, are cut, or hold no endings; StorageError, Refused, WorkerError,
    MissingExtra.
    """
    arrow()
    files = _files(sources)
    directory = directory.expanduser().resolve()
    wanted = {"import": [{"file": str(file), "bytes": file.stat().st_size} for file in files]}
    with claimed(directory, wanted):
        jobs = [
            FileJob(name=f"{number:05}", rows=_records(file), source=file)
            for number, file in enumerate(files)
        ]
        making = Making(directory=directory, jobs=jobs)
        making.find_done()
        made = making.make(_open, processes=processes or os.cpu_count() or 1, on_progress=on_progress)
        records = sum(job.rows for job in jobs)
        manifest = _manifest(directory, made, files, records, command)
        write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _files(sources: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for source in sources:
        source = source.expanduser().resolve()
        inside = sorted(source.glob("*.zst")) if source.is_dir() else [source]
        if not inside or not inside[0].is_file():
            raise DataError(f"{source}: no .zst file there; give TPG files, or directories of them")
        found += inside
    return list(dict.fromkeys(found))


def _records(file: Path) -> int:
    """How many a file holds: it is decompressed once, before anything in it is trusted. Raises DataError."""
    size = 0
    try:
        with arrow().input_stream(str(file), compression="zstd") as stream:
            while block := stream.read(1 << 22):
                size += len(block)
    except OSError as error:
        raise DataError(
            f"cannot read {file} as zstd: {error}. It is another format, or was cut short."
        ) from None
    if size == 0 or size % RECORD_BYTES:
        raise DataError(
            f"{file} holds {size:,} bytes, which is no whole number of records of {RECORD_BYTES:,}: it is another "
            "format, or was cut short."
        )
    return size // RECORD_BYTES


# ------------------------------------------------------------------------------ in the processes
@dataclass(frozen=True, slots=True, kw_only=True)
class FileJob(Job):
    """A source, whole."""

    source: Path


def _open() -> Callable[[FileJob, Path, Callable[[int], None]], MadeShards]:
    return _make


def _make(job: FileJob, directory: Path, tell: Callable[[int], None]) -> MadeShards:
    parts = {name: _Part(directory=directory, name=f"{name}-{job.name}") for name in (TRAINING, VALIDATION)}
    told = 0
    for block in read_tpg(job.source):
        held_out = is_held_out(block["squares"], _HELD_OUT)
        parts[TRAINING].add({name: values[~held_out] for name, values in block.items()})
        parts[VALIDATION].add({name: values[held_out] for name, values in block.items()})
        tell(len(held_out))
        told += len(held_out)
    tell(job.rows - told)  # those that were left out
    return {name: part.finished() for name, part in parts.items()}


@dataclass(slots=True, kw_only=True)
class _Part:
    """The rows of one set of a source, until they are enough for a shard."""

    directory: Path
    name: str
    waiting: list[Rows] = field(default_factory=list)
    rows: int = 0
    files: list[ShardFile] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        self.waiting.append(rows)
        self.rows += len(rows["squares"])
        if self.rows >= _SIZES.shard_rows:
            self._write()

    def finished(self) -> tuple[ShardFile, ...]:
        if self.rows:
            self._write()
        return tuple(self.files)

    def _write(self) -> None:
        rows = {c.name: np.concatenate([each[c.name] for each in self.waiting]) for c in _COLUMNS}
        name = f"{self.name}-{len(self.files):04}{SUFFIX}"
        self.files.append(put_shard(self.directory, name, _COLUMNS, _groups(rows, self.rows)))
        self.waiting, self.rows = [], 0


def _groups(rows: Rows, count: int) -> Iterator[Rows]:
    for start in range(0, count, _SIZES.group_rows):
        yield {name: values[start : start + _SIZES.group_rows] for name, values in rows.items()}


# ------------------------------------------------------------------------------ the manifest
def _manifest(
    directory: Path, made: dict[str, tuple[ShardFile, ...]], files: Sequence[Path], records: int, command: str
) -> Manifest:
    left_out = records - sum(file.rows for each in made.values() for file in each)
    for name in (TRAINING, VALIDATION):
        if not made.get(name):
            raise DataError(
                f"the files hold too few endings: none is for {name}. Of {records:,} positions {left_out:,} have "
                f"castling rights or more than {MOST_MEN} pieces, and are left out"
            )
    sets = {
        name: ShardSet(columns=_COLUMNS, group_rows=_SIZES.group_rows, files=made[name])
        for name in (TRAINING, VALIDATION)
    }
    pieces = _pieces(directory, sets)
    task = ChessEndgamesTask(
        pieces=pieces, positions=sets[TRAINING].rows, validation_positions=sets[VALIDATION].rows
    ).model_dump(mode="json")
    kept = directory / MATERIALS
    kept.mkdir(exist_ok=True)
    text = json.dumps({"version": 1, "pieces": pieces, "tables": []}, indent=1, sort_keys=True) + "\n"
    (kept / RECORD).write_text(text, encoding="utf-8")
    entry = Made(
        command=command,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        manyhands=version("manyhands"),
        seed=0,
        rows=sets[TRAINING].rows,
        task={**task, "imported": [file.name for file in files], LEFT_OUT: left_out},
        sources={str(file): sha256_of(file) for file in files},
    )
    record = Material(size_bytes=(kept / RECORD).stat().st_size, sha256=sha256_of(kept / RECORD))
    return Manifest(task=task, seed=0, sets=sets, materials={RECORD: record}, made=(entry,))


def _pieces(directory: Path, sets: dict[str, ShardSet]) -> str:
    """The specification of all endings that there are."""
    squares = [column for column in _COLUMNS if column.name == "squares"]
    groups = (
        (file, group) for part in sets.values() for file in part.files for group in range(len(file.groups))
    )
    found: set[str] = set()
    for file, group in groups:
        rows = read_group(directory / file.name, squares, dict(file.stored), group)["squares"]
        for own, other, _ in by_pieces(rows.astype(np.uint8)):
            both = ending(own, other)
            found.add(both.strong + both.weak.lower())
    return parse(",".join(sorted(found))).text
