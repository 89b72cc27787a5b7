"""Processes that do jobs: spawned, each with a pipe; they end when the one that started them is gone, in any way.

Not a pool of the standard library: the processes of those wait for ever when their parent is killed.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from manyhands import errors
from manyhands.data.shards.manifest import ShardFile
from manyhands.data.shards.writer import arrow
from manyhands.errors import ManyhandsError, StorageError, WorkerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a process makes at a time, and loses when it is killed: some shards. `name`: its own."""

    name: str
    rows: int


Made = dict[str, tuple[ShardFile, ...]]
"""By set, the shards that a job gave; they lie in the directory."""
Maker = Callable[[Any, Path, Callable[[int], None]], Made]
"""(job, directory, tell) -> what it gave; `tell` takes the number of rows that came since the last time."""


class Opens(Protocol):
    """What is sent to each process, so it can be pickled: opens there what does the jobs."""

    def __call__(self) -> Maker: ...


class Processes:
    """As a context, which ends them."""

    def __init__(self, directory: Path, opens: Opens) -> None:
        self._directory, self._opens = directory, opens
        self._workers: dict[Connection, Any] = {}
        self._busy: dict[Connection, Job] = {}

    def __enter__(self) -> Processes:
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

    def run(
        self,
        jobs: Sequence[Job],
        processes: int,
        *,
        on_rows: Callable[[int], None],
        on_made: Callable[[str, Made], None],
        so_far: Callable[[], str],
    ) -> None:
        """Do all jobs with so many processes, in their order as far as several processes have one.

        `so_far`: for errors, what is made already. Raises what a process raised; WorkerError for one that was killed.
        """
        waiting = list(reversed(jobs))
        for _ in range(min(processes, len(jobs))):
            self._give(self._start(), waiting)
        while self._busy:
            for pipe in wait(list(self._busy)):
                assert isinstance(pipe, Connection)
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    raise self._lost(pipe, so_far()) from None
                if kind == "rows":
                    on_rows(value)
                elif kind == "made":
                    on_made(self._busy[pipe].name, value)
                    self._give(pipe, waiting)
                else:
                    name, text = value
                    raise _told(name, text, so_far())

    def _start(self) -> Connection:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, self._opens, self._directory),
            daemon=True,
        )
        process.start()
        theirs.close()
        self._workers[ours] = process
        return ours

    def _give(self, pipe: Connection, waiting: list[Job]) -> None:
        self._busy.pop(pipe, None)
        if waiting:
            self._busy[pipe] = waiting.pop()
            with suppress(OSError):  # of a process that has died: its pipe tells it
                pipe.send(self._busy[pipe])

    def _lost(self, pipe: Connection, so_far: str) -> WorkerError:
        process = self._workers[pipe]
        process.join(timeout=10)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return WorkerError(
            f"a process that made {self._busy[pipe].name} ended with {how}; {so_far}. If it was short of memory, "
            "choose fewer --processes"
        )


def _told(kind: str, text: str, so_far: str) -> ManyhandsError:
    """What a process raised, here."""
    found: type[ManyhandsError] = getattr(errors, kind, WorkerError)
    return found(f"{text}; {so_far}") if found is StorageError else found(text)


# ------------------------------------------------------------------------------ in a process of its own
def _work(pipe: Connection, opens: Opens, directory: Path) -> None:
    """Do the jobs that come through the pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, it goes to all: the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        arrow().set_cpu_count(1)
        make = opens()
        while True:
            pipe.send(("made", make(pipe.recv(), directory, lambda rows: pipe.send(("rows", rows)))))
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
