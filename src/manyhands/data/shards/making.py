"""Making shards with several processes: each shard is a function of (what is asked for, its number) alone.

    DIR/.making/wanted.json     what was asked for; another wish for the same directory is refused
    DIR/.making/done.jsonl      one line for each shard that is whole, written after it is
    DIR/.making/*               shards that are being written, and whatever the maker of rows keeps
    DIR/manifest.json           written last; then .making goes

A shard is written aside, made durable and renamed, so a half-written one is never seen. Who starts again after a
kill -9 finds what is done, compares each file with its hash, and makes the rest: the same bytes, whatever the number
of processes and however often it was interrupted.

The processes are spawned, have a pipe each, and end when the parent is gone, however it went.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from manyhands import errors
from manyhands.config import shown
from manyhands.data.shards.manifest import (
    MAKING,
    MANIFEST,
    SUFFIX,
    Column,
    ShardFile,
    ShardSet,
    differences,
    write_json,
)
from manyhands.data.shards.verify import sha256_of
from manyhands.data.shards.writer import Rows, arrow, check_rows, write_shard
from manyhands.errors import DataError, ManyhandsError, StorageError, WorkerError
from manyhands.storage.durable import sync

GROUP_ROWS: Final = 8192
GROUP_BYTES: Final = 2 << 20
"""Of a row group, as it is before integers are narrowed; it has at least one row."""
SHARD_ROWS: Final = 65_536
SHARD_BYTES: Final = 256 << 20
"""Of a shard, likewise: it is held in memory by the process that makes it, and lost when that is killed."""

RECORD: Final = "done.jsonl"
PREPARED: Final = "prepared.json"
"""Written into .making by the maker of rows, when it has prepared what it needs."""

_BLOCK_ROWS: Final = 1024
"""Rows that are asked for at a time; progress is told after each."""


Produce = Callable[[str, npt.NDArray[np.int64]], Rows]
"""(set, positions int64 [n]) -> the rows there, by column [n, ...]. A function of its arguments."""


class Opens(Protocol):
    """What is sent to each process, so it can be pickled: opens there what produces the rows."""

    def __call__(self) -> Produce: ...


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
    """Rows of all sets. `left_s`: None before there is something to judge by. `kept`: rows of an earlier start."""

    rows: int
    total: int
    kept: int
    shards: int
    total_shards: int
    rows_per_s: float
    left_s: float | None


@dataclass(frozen=True, slots=True)
class _Job:
    """One shard to make."""

    set: str
    file: str
    start: int
    stop: int


def claim(directory: Path, wanted: Mapping[str, Any]) -> None:
    """Take a directory for shards: a new one, an empty one, or one in which the same was begun, or nothing made yet.

    `wanted`: what is asked for, as plain data. Raises DataError for a directory that holds something else,
    StorageError for one that cannot be written.
    """
    _check_place(directory)
    place, values = directory / MAKING, json.loads(json.dumps(wanted))
    file = place / "wanted.json"
    if file.is_file() and not _same_wish(values, file, directory):
        shutil.rmtree(place)
        place.mkdir()
    if not file.is_file():
        write_json(file, values)


def give_up(directory: Path) -> None:
    """Leave nothing of a claim behind, unless something was made."""
    if not any((directory / MAKING / name).exists() for name in (RECORD, PREPARED)):
        shutil.rmtree(directory / MAKING, ignore_errors=True)
        with suppress(OSError):
            directory.rmdir()


@dataclass(slots=True, kw_only=True)
class Making:
    """The shards of a directory that is claimed."""

    directory: Path
    wanted: Mapping[str, WantedSet]
    done: dict[str, ShardFile] = field(default_factory=dict)

    @property
    def place(self) -> Path:
        return self.directory / MAKING

    def jobs(self) -> list[_Job]:
        return [_Job(name, *part) for name, want in self.wanted.items() for part in want.files(name)]

    def find_done(self) -> None:
        """Of an earlier start. Each file is read and compared with its hash."""
        for aside in self.place.glob("*.partial"):
            aside.unlink()
        self.done = dict(self._kept())
        aside = self.place / f"{RECORD}.partial"  # without what is broken, or was cut
        aside.write_text("".join(f.model_dump_json() + "\n" for f in self.done.values()), encoding="utf-8")
        if self.done:
            aside.replace(self.place / RECORD)

    def make(
        self, opens: Opens, *, processes: int, on_progress: Callable[[Progress], None] | None = None
    ) -> dict[str, ShardSet]:
        """What is not done, with so many processes; all of the sets. Raises what a process raised, WorkerError."""
        todo = [job for job in self.jobs() if job.file not in self.done]
        with (self.place / RECORD).open("a", encoding="utf-8") as record, _Pool(self, opens) as pool:
            pool.run(todo, min(processes, len(todo)), record, _Clock(self, on_progress))
        return {
            name: ShardSet(
                columns=want.columns,
                group_rows=want.group_rows,
                files=tuple(self.done[file] for file, _, _ in want.files(name)),
            )
            for name, want in self.wanted.items()
        }

    def _kept(self) -> Iterator[tuple[str, ShardFile]]:
        """The shards of an earlier start that are whole: each is read and compared with its hash."""
        record = self.place / RECORD
        names = {job.file for job in self.jobs()}
        for line in record.read_text(encoding="utf-8").splitlines() if record.is_file() else ():
            try:
                file = ShardFile.model_validate_json(line)
            except ValidationError:  # cut by the kill; its shard is made again
                continue
            path = self.directory / file.name
            if file.name in names and path.is_file() and sha256_of(path) == file.sha256:
                yield file.name, file


def _same_wish(values: Mapping[str, Any], file: Path, directory: Path) -> bool:
    """Raises DataError for another wish, if some of the old one is made."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # cut by a kill, so nothing is made
        return False
    made = file.with_name(RECORD)
    for path, now, then in differences(values, before):
        if not made.is_file():
            return False
        raise DataError(
            f"{directory} holds shards that are half made, with {path} {shown(then)}, and now it is {shown(now)}: "
            "repeat the command that began them, choose another directory, or remove this one"
        )
    return True


class _Clock:
    """Rows as they are made, and how long the rest will take."""

    def __init__(self, making: Making, on_progress: Callable[[Progress], None] | None) -> None:
        self._making, self._tell = making, on_progress
        self._total = sum(want.rows for want in making.wanted.values())
        self._shards = len(making.jobs())
        self._kept = sum(file.rows for file in making.done.values())
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
                shards=len(self._making.done),
                total_shards=self._shards,
                rows_per_s=rate,
                left_s=(self._total - rows_now) / rate if rate else None,
            )
        )


class _Pool:
    """Processes that make shards, each with a pipe; as a context, which ends them."""

    def __init__(self, making: Making, opens: Opens) -> None:
        self._making, self._opens = making, opens
        self._workers: dict[Connection, Any] = {}
        self._busy: dict[Connection, _Job] = {}

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in self._workers.items():
            pipe.close()
            process.terminate()
        for process in self._workers.values():
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()

    def run(self, jobs: Sequence[_Job], processes: int, record: Any, clock: _Clock) -> None:
        """Make all jobs, in their order as far as several processes have one."""
        waiting = list(reversed(jobs))
        for _ in range(processes):
            self._give(self._start(), waiting)
        while self._busy:
            for pipe in wait(list(self._busy)):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    raise self._lost(pipe) from None
                if kind == "rows":
                    clock.add(value)
                elif kind == "made":
                    self._keep(value, record)
                    clock.add(0)
                    self._give(pipe, waiting)
                else:
                    raise self._told(*value)

    def _start(self) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, self._opens, self._making.directory, dict(self._making.wanted)),
            daemon=True,
        )
        process.start()
        theirs.close()
        self._workers[ours] = process
        return ours

    def _give(self, pipe: Connection, waiting: list[_Job]) -> None:
        self._busy.pop(pipe, None)
        if waiting:
            self._busy[pipe] = waiting.pop()
            pipe.send(self._busy[pipe])

    def _keep(self, file: ShardFile, record: Any) -> None:
        record.write(file.model_dump_json() + "\n")
        record.flush()
        os.fsync(record.fileno())
        self._making.done[file.name] = file

    def _lost(self, pipe: Connection) -> WorkerError:
        process = self._workers[pipe]
        process.join(timeout=10)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return WorkerError(
            f"a process that made {self._busy[pipe].file} ended with {how}, {self._so_far()} If it was short of "
            "memory, choose fewer --processes"
        )

    def _told(self, kind: str, text: str) -> ManyhandsError:
        found = getattr(errors, kind, WorkerError)
        return found(f"{text}; {self._so_far()}") if found is StorageError else found(text)

    def _so_far(self) -> str:
        made, total = len(self._making.done), len(self._making.jobs())
        return f"{made} of {total} shards are made and kept: the same command goes on from there."


# ------------------------------------------------------------------------------ in a process of its own
def _work(pipe: Connection, opens: Opens, directory: Path, wanted: Mapping[str, WantedSet]) -> None:
    """Make the shards that the pipe names, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, it goes to all: the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        arrow().set_cpu_count(1)
        produce = opens()
        while True:
            job = pipe.recv()
            file = _make(job, produce, wanted[job.set], directory, lambda rows: pipe.send(("rows", rows)))
            pipe.send(("made", file))
    except (EOFError, BrokenPipeError):
        return
    except ManyhandsError as error:
        pipe.send(("failed", (type(error).__name__, str(error))))
    except OSError as error:
        pipe.send(("failed", ("StorageError", f"{directory}: {error.strerror or error}")))
    except Exception:  # noqa: BLE001 - the boundary of the process, and of a user's own task
        text = f"making shards failed:\n{traceback.format_exc()[-3000:].rstrip()}"
        pipe.send(("failed", ("WorkerError", text)))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _make(
    job: _Job, produce: Produce, want: WantedSet, directory: Path, tell: Callable[[int], None]
) -> ShardFile:
    def groups() -> Iterator[Rows]:
        for start in range(job.start, job.stop, want.group_rows):
            yield _group(job.set, start, min(start + want.group_rows, job.stop))

    def _group(name: str, start: int, stop: int) -> Rows:
        blocks = []
        for first in range(start, stop, _BLOCK_ROWS):
            positions = np.arange(first, min(first + _BLOCK_ROWS, stop), dtype=np.int64)
            rows = produce(name, positions)
            check_rows(rows, want.columns, len(positions), f"set {name!r}, rows from {first}")
            blocks.append(rows)
            tell(len(positions))
        return {c.name: np.concatenate([block[c.name] for block in blocks]) for c in want.columns}

    aside = directory / MAKING / f"{job.file}.{os.getpid()}.partial"
    written = write_shard(aside, want.columns, groups())
    aside.replace(directory / job.file)
    sync(directory)
    return written.model_copy(update={"name": job.file})


def _check_place(directory: Path) -> None:
    """Raises DataError for a directory in which shards cannot be made: it holds something else, or is read-only."""
    if (directory / MANIFEST).is_file():
        shutil.rmtree(directory / MAKING, ignore_errors=True)  # left by a kill behind the last step
        raise DataError(
            f"{directory} holds shards already (`manyhands shards info {directory}`): choose another directory"
        )
    found = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    if found and MAKING not in found:
        raise DataError(f"{directory} is not empty ({min(found)}): choose a new directory for the shards")
    try:
        (directory / MAKING).mkdir(parents=True, exist_ok=True)
        probe = directory / MAKING / f"probe.{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write into {directory}: {error.strerror or error}; choose another directory"
        ) from error
