"""Several worker processes that are one worker: the ranks of a client with several devices.

Rank 0 is spoken to; what all ranks do together each of them is asked for. The first death ends all of them, and a
group that has lost its step (one rank has ended a piece of work, another has not) is ended too: whoever owns the
group starts another. A group of one is a worker process and nothing else.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manyhands.errors import WorkerError
from manyhands.node.worker_process import SILENCE_S, WorkerProcess

RANK_TIMEOUT_S = 120.0
"""So long one of them waits for the others in the middle of it."""
OUT_OF_STEP_S = 10.0
"""So long ranks may be apart at the end of what they do together."""


class WorkerGroup:
    """Made by `start`. Calls may overlap, each rank carries them out in order."""

    def __init__(self, processes: list[WorkerProcess], meeting: Path) -> None:
        self._processes = processes
        self._meeting = meeting
        self._words = ""
        self._together: set[asyncio.Task[Any]] = set()
        self._watching = asyncio.create_task(self._watch(), name=f"group of {self.pid}")

    @classmethod
    async def start(
        cls,
        module: str,
        size: int,
        *,
        directory: Path,
        log: Path,
        on_notice: Callable[[dict[str, Any]], None] | None = None,
        silence_s: float | None = SILENCE_S,
    ) -> WorkerGroup:
        """Start `size` times `python -m module`. They meet in a file in `directory`; notices are rank 0's.

        log: of rank 0; that of rank r is beside it, as <name>-r.
        """
        processes: list[WorkerProcess] = []
        try:
            for rank in range(size):
                process = await WorkerProcess.start(
                    module,
                    log=log.with_stem(f"{log.stem}-{rank}") if rank else log,
                    on_notice=None if rank else on_notice,
                    silence_s=silence_s,
                    title="" if size == 1 else f"rank={rank}",
                )
                processes.append(process)
        except BaseException:
            await asyncio.gather(*(process.stop() for process in processes))
            raise
        return cls(processes, directory / f"meeting-{uuid.uuid4().hex[:8]}.part")

    @property
    def size(self) -> int:
        return len(self._processes)

    @property
    def pid(self) -> int:
        """Rank 0's."""
        return self._processes[0].pid

    @property
    def alive(self) -> bool:
        return all(process.alive for process in self._processes)

    @property
    def meeting(self) -> Path:
        """A file of this group alone, which none of them has made yet."""
        return self._meeting

    async def call(self, operation: str, **arguments: Any) -> Any:
        """As WorkerProcess.call, at rank 0."""
        if not self.alive:
            raise WorkerError(self.last_words())
        return await self._processes[0].call(operation, **arguments)

    async def call_all(self, operation: str, **arguments: Any) -> Any:
        """What all ranks do together, each with its `rank` in the arguments; what rank 0 returns.

        Raises what the first of them raised. If the caller is cancelled, they finish all the same.
        """
        if not self.alive:
            raise WorkerError(self.last_words())
        task = asyncio.create_task(self._all(operation, arguments), name=f"{operation} of all ranks")
        self._together.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def abandon(self, assignment: str) -> None:
        """Ask rank 0 to give up this work between two micro-batches; the ranks agree on it."""
        self._processes[0].abandon(assignment)

    async def stop(self, grace_s: float = 2.0) -> None:
        """End all of them."""
        self._watching.cancel()
        await asyncio.gather(self._watching, *(process.stop(grace_s) for process in self._processes),
                             return_exceptions=True)  # fmt: skip
        await asyncio.gather(*self._together, return_exceptions=True)
        self._meeting.unlink(missing_ok=True)

    def last_words(self) -> str:
        """How the first one died, and the end of its log."""
        if self._words:
            return self._words
        dead = [rank for rank, process in enumerate(self._processes) if not process.alive]
        return self._words_of(dead[0] if dead else 0)

    # ------------------------------------------------------------------ inside
    async def _all(self, operation: str, arguments: dict[str, Any]) -> Any:
        calls = [
            asyncio.create_task(process.call(operation, rank=rank, **arguments))
            for rank, process in enumerate(self._processes)
        ]
        await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
        failed = next((call for call in calls if call.done() and call.exception() is not None), None)
        if failed is None:
            return calls[0].result()
        _, behind = await asyncio.wait(calls, timeout=OUT_OF_STEP_S)
        if behind:
            self._words = f"rank {calls.index(failed)} of {self.size} failed alone: {failed.exception()}"
            self._end()
        await asyncio.gather(*calls, return_exceptions=True)
        if not self.alive:
            await asyncio.wait([self._watching])
            raise WorkerError(self.last_words())
        return failed.result()  # raises

    async def _watch(self) -> None:
        """At the first death end the others, and remember whose it was."""
        endings = [asyncio.create_task(process.ended()) for process in self._processes]
        try:
            await asyncio.wait(endings, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for ending in endings:
                ending.cancel()
        dead = next(rank for rank, process in enumerate(self._processes) if not process.alive)
        self._words = self._words or self._words_of(dead)
        self._end()

    def _words_of(self, rank: int) -> str:
        words = self._processes[rank].last_words()
        return words if self.size == 1 else f"rank {rank} of {self.size}: {words}"

    def _end(self) -> None:
        for process in self._processes:
            process.kill()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._together.discard(task)
        if not task.cancelled():
            task.exception()  # whoever asked was cancelled, or has it
