"""Making shards with several processes: what a job makes is a function of what is asked for and of the job alone.

A shard is written aside, made durable and renamed, so a half-written one is never seen; .making/done.jsonl gets a
line when a job is done. Who starts again after a kill -9 finds what is done, compares each file with its hash, and
makes the rest: the same bytes, whatever the number of processes and however often it was interrupted. The manifest is
written last, by whoever asked (tasks/packing.py); then .making goes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from manyhands.config import Settings
from manyhands.data.shards.claim import RECORD
from manyhands.data.shards.manifest import MAKING, SUFFIX, Column, ShardFile
from manyhands.data.shards.processes import Job, Made, Opens, Processes
from manyhands.data.shards.verify import sha256_of
from manyhands.data.shards.writer import Rows, check_rows, write_shard
from manyhands.errors import DataError, StorageError
from manyhands.storage.durable import sync

GROUP_ROWS: Final = 8192
GROUP_BYTES: Final = 2 << 20
"""Of a row group, as it is before integers are narrowed; it has at least one row."""
SHARD_ROWS: Final = 65_536
SHARD_BYTES: Final = 256 << 20
"""Of a shard, likewise: it is held in memory by the process that makes it, and lost when that is killed."""

MOST_SHARDS: Final = 100_000
_ROOM: Final = 0.8
"""What is still to be made may take so much less than what was made says."""
_BLOCK_ROWS: Final = 1024
"""Rows that are asked for at a time; progress is told after each."""


Produce = Callable[[str, npt.NDArray[np.int64]], Rows]
"""(set, positions int64 [n]) -> the rows there, by column [n, ...]. A function of its arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedSet:
    """So many rows of these columns, in shards of `shard_rows`, in row groups of `group_rows`."""

    rows: int
    columns: tuple[Column, ...]
    group_rows: int
    shard_rows: int

    @classmethod
    def of(cls, rows: int, columns: tuple[Column, ...], shard_rows: int | None = None) -> WantedSet:
        """With row groups and shards of a sensible size for these columns."""
        row_bytes = max(1, sum(column.row_bytes for column in columns))
        group = max(1, min(GROUP_ROWS, GROUP_BYTES // row_bytes))
        most = max(group, min(SHARD_ROWS, SHARD_BYTES // row_bytes) // group * group)
        return cls(rows=rows, columns=columns, group_rows=group, shard_rows=shard_rows or most)

    def files(self, name: str) -> Iterator[tuple[str, int, int]]:
        """Name, first row and the row behind the last, of each shard."""
        for number, start in enumerate(range(0, self.rows, self.shard_rows)):
            yield f"{name}-{number:05}{SUFFIX}", start, min(start + self.shard_rows, self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Rows of all sets, and jobs, each of which gives one shard or some. `kept`: rows of an earlier start. `left_s`:
    None before there is something to judge by."""

    rows: int
    total: int
    kept: int
    jobs: int
    total_jobs: int
    rows_per_s: float
    left_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsJob(Job):
    """The rows from `start` to `stop` of a set, as one shard, which is called as the job is."""

    set: str
    start: int
    stop: int


def row_jobs(wanted: Mapping[str, WantedSet]) -> list[RowsJob]:
    """All shards of all sets. Raises DataError for more than a directory and a manifest should hold."""
    for name, want in wanted.items():
        count = -(-want.rows // want.shard_rows)
        if count > MOST_SHARDS:
            raise DataError(
                f"{want.rows:,} rows of {name} are {count:,} shards of {want.shard_rows:,} rows, and {MOST_SHARDS:,} "
                "are the most: ask for fewer rows, or for more in each shard"
            )
    return [
        RowsJob(name=file, rows=stop - start, set=name, start=start, stop=stop)
        for name, want in wanted.items()
        for file, start, stop in want.files(name)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMaker:
    """Does the jobs of `row_jobs`; implements processes.Maker."""

    produce: Produce
    wanted: Mapping[str, WantedSet]

    def __call__(self, job: RowsJob, directory: Path, tell: Callable[[int], None]) -> Made:
        want = self.wanted[job.set]
        starts = range(job.start, job.stop, want.group_rows)
        groups = (
            self._group(job.set, start, min(start + want.group_rows, job.stop), tell) for start in starts
        )
        return {job.set: (put_shard(directory, job.name, want.columns, groups),)}

    def _group(self, name: str, start: int, stop: int, tell: Callable[[int], None]) -> Rows:
        columns, blocks = self.wanted[name].columns, []
        for first in range(start, stop, _BLOCK_ROWS):
            positions = np.arange(first, min(first + _BLOCK_ROWS, stop), dtype=np.int64)
            rows = self.produce(name, positions)
            check_rows(rows, columns, len(positions), f"set {name!r}, rows from {first}")
            blocks.append(rows)
            tell(len(positions))
        return {c.name: np.concatenate([block[c.name] for block in blocks]) for c in columns}


def put_shard(directory: Path, name: str, columns: Sequence[Column], groups: Iterable[Rows]) -> ShardFile:
    """Write a shard aside, durably, and then put it into the directory."""
    aside = directory / MAKING / f"{name}.{os.getpid()}.partial"
    try:
        written = write_shard(aside, columns, groups)
    except BaseException:
        aside.unlink(missing_ok=True)  # of a full disk
        raise
    aside.replace(directory / name)
    sync(directory)
    return written.model_copy(update={"name": name})


@dataclass(slots=True, kw_only=True)
class Making:
    """The shards of a directory that is claimed (claim.py). `done`: by job, the shards that it gave."""

    directory: Path
    jobs: Sequence[Job]
    done: dict[str, Made] = field(default_factory=dict)

    def find_done(self) -> None:
        """Of an earlier start. Each file is read and compared with its hash."""
        place = self.directory / MAKING
        for aside in place.glob("*.partial"):
            aside.unlink()
        self.done = dict(self._kept())
        if self.done:  # without lines that were cut, and those of shards that are broken
            aside = place / f"{RECORD}.partial"
            aside.write_text("".join(_line(*each) for each in self.done.items()), encoding="utf-8")
            aside.replace(place / RECORD)

    def make(
        self, opens: Opens, *, processes: int, on_progress: Callable[[Progress], None] | None = None
    ) -> dict[str, tuple[ShardFile, ...]]:
        """What is not done, with so many processes; all shards by set, in the order of the jobs.

        Raises what a process raised; WorkerError for one that was killed.
        """
        todo = [job for job in self.jobs if job.name not in self.done]
        rows = {job.name: job.rows for job in todo}
        recorded = sum(_bytes_of(made) for made in self.done.values())
        clock, room = _Clock(self, on_progress), _Room(self.directory, sum(rows.values()), recorded)
        with (self.directory / MAKING / RECORD).open("a", encoding="utf-8") as record:

            def keep(name: str, made: Made) -> None:
                record.write(_line(name, made))
                record.flush()
                os.fsync(record.fileno())
                self.done[name] = made
                clock.add(0)
                room.taken(rows[name], made)

            with Processes(self.directory, opens) as pool:
                pool.run(todo, processes, on_rows=clock.add, on_made=keep, so_far=self._so_far)
        sets: dict[str, tuple[ShardFile, ...]] = {}
        for job in self.jobs:
            for name, files in self.done[job.name].items():
                sets[name] = sets.get(name, ()) + files
        return sets

    def _so_far(self) -> str:
        return f"{len(self.done)} of {len(self.jobs)} are made and kept: the same command goes on from there"

    def _kept(self) -> Iterator[tuple[str, Made]]:
        record = self.directory / MAKING / RECORD
        names = {job.name for job in self.jobs}
        for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
            try:
                done = _Done.model_validate_json(line)
            except ValidationError:  # cut by the kill; what it gave is made again
                continue
            if done.job in names and all(self._whole(file) for each in done.made.values() for file in each):
                yield done.job, done.made

    def _whole(self, file: ShardFile) -> bool:
        path = self.directory / file.name
        return path.is_file() and sha256_of(path) == file.sha256


class _Done(Settings):
    """A line of the record."""

    job: str
    made: dict[str, tuple[ShardFile, ...]]


def _line(name: str, made: Made) -> str:
    return _Done(job=name, made=made).model_dump_json() + "\n"


def _bytes_of(made: Made) -> int:
    """Bytes of the shards that a job gave."""
    return sum(file.size_bytes for files in made.values() for file in files)


class _Room:
    """Whether the disk has place for the rest, judged by what was made since this start."""

    def __init__(self, directory: Path, rows: int, recorded: int) -> None:
        self._directory, self._left, self._recorded = directory, rows, recorded
        self._rows = self._bytes = 0

    def taken(self, rows: int, made: Made) -> None:
        """By a job. Raises StorageError where the rest will not go in: what is made is kept."""
        self._left -= rows
        self._rows += rows
        size = _bytes_of(made)
        self._bytes += size
        self._recorded += size
        needed = self._left * self._bytes / self._rows if self._rows else 0.0
        free = shutil.disk_usage(self._directory).free
        if needed * _ROOM > free:  # of what is left some is written already, by jobs that have not ended
            free += self._unrecorded()
        if needed * _ROOM > free:
            raise StorageError(
                f"{self._directory}: about {needed / 2**30:,.1f} GiB more are needed for {self._left:,} rows, and "
                f"{free / 2**30:,.1f} GiB are free there: make room and go on with the same command, or ask for "
                "fewer in another directory"
            )

    def _unrecorded(self) -> int:
        """Bytes of shards that no record has yet, whole or not."""
        found = 0
        for file in (*self._directory.glob(f"*{SUFFIX}"), *(self._directory / MAKING).glob("*.partial")):
            with suppress(FileNotFoundError):  # it has got its name meanwhile
                found += file.stat().st_size
        return max(0, found - self._recorded)


class _Clock:
    """Rows as they are made, and how long the rest will take."""

    def __init__(self, making: Making, on_progress: Callable[[Progress], None] | None) -> None:
        self._making, self._tell = making, on_progress
        self._total = sum(job.rows for job in making.jobs)
        self._kept = sum(job.rows for job in making.jobs if job.name in making.done)
        self._made = 0
        self._first: tuple[float, int] | None = None  # when rows came first, and how many
        self._told = 0.0
        self.add(0)

    def add(self, rows: int) -> None:
        self._made += rows
        now = time.monotonic()
        if self._first is None and rows:  # what comes before is the start of the processes
            self._first = now, rows
        rows_now = self._kept + self._made
        if self._tell is None or (now - self._told < 0.2 and rows_now < self._total):
            return
        self._told = now
        rate = 0.0
        if self._first is not None:
            since, before = self._first
            rate = (self._made - before) / max(now - since, 1e-9)
        self._tell(
            Progress(
                rows=rows_now,
                total=self._total,
                kept=self._kept,
                jobs=len(self._making.done),
                total_jobs=len(self._making.jobs),
                rows_per_s=rate,
                left_s=(self._total - rows_now) / rate if rate else None,
            )
        )
