"""The client's worker process, kept alive: started, and after a death started again where it was.

`base` and `applied` are enough to make the worker's public anew: a snapshot on disk and the closings since. The
client's local state is on disk too (the worker saves it after each work), so a death costs the work under way and
nothing else. Calls may overlap; a death is one death for all of them, and whoever notices first starts anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.types import Claims, Closed, Closing, Held, Snapshot, Work
from manyhands.errors import WorkerError
from manyhands.node.client.files import ClientFiles
from manyhands.node.client.options import ClientOptions
from manyhands.node.worker_process import WorkerProcess
from manyhands.plan.descriptor import RunDescriptor

RESTARTS = 5
RESTART_WINDOW_S = 600.0
REMEMBERED_CLOSINGS = 8
"""Enough to settle what a saved local state has pending: it is of one of the last rounds, or of no use."""

_claims = TypeAdapter(Claims)
_closed = TypeAdapter(Closed)
_closings = TypeAdapter(tuple[Closing, ...])
_work = TypeAdapter(Work)


class WorkerLost(WorkerError):
    """The worker has died too often: this client cannot work."""


class ClientWorker:
    """Calls survive the worker's death, RESTARTS times in RESTART_WINDOW_S; then they raise WorkerLost."""

    def __init__(
        self,
        descriptor: RunDescriptor,
        files: ClientFiles,
        options: ClientOptions,
        on_progress: Callable[[dict[str, object]], None],
        on_death: Callable[[str], None],
    ) -> None:
        self._descriptor = descriptor
        self._files = files
        self._options = options
        self._on_progress = on_progress
        self._on_death = on_death
        self._starting = asyncio.Lock()
        self._process: WorkerProcess | None = None
        self._deaths: list[float] = []
        self._base: tuple[Snapshot, Path] | None = None
        self._applied: list[tuple[Closed, list[Path]]] = []
        self._closings: deque[Closing] = deque(maxlen=REMEMBERED_CLOSINGS)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start the process and open the run in it."""
        await self._living()

    async def stop(self) -> None:
        if self._process is not None:
            await self._process.stop()

    def abandon(self, assignment: str) -> None:
        if self._process is not None:
            self._process.abandon(assignment)

    # ------------------------------------------------------------------ operations
    async def load(self, snapshot: Snapshot, path: Path, earlier: Sequence[Closing]) -> None:
        """Public (in a mesh also outer) from a snapshot; raises BlobError if it is not the one named.

        `earlier`: closings before it, which settle what the local state has pending.
        """
        self._base, self._applied = (snapshot, path), []
        heard = {closing.round for closing in self._closings}
        self._closings.extend(closing for closing in earlier if closing.round not in heard)
        await self._call("load", **self._load_arguments(snapshot, path))
        self._forget()

    async def close(self, closed: Closed, paths: list[Path]) -> Held:
        """Apply a closing; the fingerprints of what is held afterwards."""
        held = await self._close(closed, paths)
        self._applied.append((closed, paths))
        self._closings.append(closed.closing)
        if len(self._applied) >= self._descriptor.plan.rounds.snapshot_every:
            await self._save_base(closed.closing.round + 1, held)
        return held

    async def work(self, work: Work, path: Path) -> Claims | None:
        """Do an assignment and write its update to `path`; None if it was abandoned."""
        claims = await self._call("work", work=_work.dump_python(work, mode="json"), path=str(path))
        return None if claims is None else _claims.validate_python(claims)

    async def check(self, path: Path, norm: float) -> str:
        """Why the update at `path` is not acceptable; empty if it is."""
        return str(await self._call("check", path=str(path), norm=norm))

    async def snapshot(self, path: Path) -> Held:
        """Write a snapshot of public (in a mesh with outer); its fingerprints."""
        return Held(*await self._call("snapshot", path=str(path)))

    # ------------------------------------------------------------------ inside
    def _notice(self, notice: dict[str, Any]) -> None:
        if "progress" in notice:
            self._on_progress(notice["progress"])

    async def _close(self, closed: Closed, paths: list[Path]) -> Held:
        body = _closed.dump_python(closed, mode="json")
        return Held(*await self._call("close", closed=body, paths=[str(path) for path in paths]))

    async def _save_base(self, at: int, held: Held) -> None:
        path = self._files.directory.path / f"public-{at}.safetensors"
        old = self._base
        await self._call("snapshot", path=str(path))
        assert self._base is not None
        public, outer = held
        saved = Snapshot(round=at, blob=self._base[0].blob, fingerprint=public, outer_fingerprint=outer)
        self._base = (saved, path)
        self._applied = []
        if old is not None and old[1] != path:
            old[1].unlink(missing_ok=True)
        self._forget()

    def _forget(self) -> None:
        keep = {path for _, paths in self._applied for path in paths}
        if self._base is not None:
            keep.add(self._base[1])
        self._files.forget(keep)

    def _load_arguments(self, snapshot: Snapshot, path: Path) -> dict[str, Any]:
        return {
            "path": str(path),
            "round": snapshot.round,
            "held": snapshot.held,
            "settle": _closings.dump_python(
                tuple(closing for closing in self._closings if closing.round < snapshot.round), mode="json"
            ),
        }

    async def _call(self, operation: str, **arguments: Any) -> Any:
        while True:
            process = await self._living()
            try:
                return await process.call(operation, **arguments)
            except WorkerError:
                if process.alive:  # the operation failed, not the process
                    raise

    async def _living(self) -> WorkerProcess:
        """The process; after a death a new one, with the public of the old one. Raises WorkerLost."""
        async with self._starting:
            while self._process is None or not self._process.alive:
                if self._process is not None:
                    self._count_death(self._process.last_words())
                    await self._process.stop()
                self._process = await self._started()
            return self._process

    def _count_death(self, words: str) -> None:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < RESTART_WINDOW_S] + [now]
        if len(self._deaths) > RESTARTS:
            raise WorkerLost(
                f"the worker died {len(self._deaths)} times in ten minutes; the last time: {words}"
            )
        self._on_death(words)

    async def _started(self) -> WorkerProcess:
        """A new process that holds what the last one held; it may have died again by the time it is returned."""
        dummy = self._descriptor.plan.task.name == "dummy"
        process = await WorkerProcess.start(
            f"manyhands.node.workers.{'dummy' if dummy else 'client'}_worker",
            log=self._files.logs / "worker.log",
            on_notice=self._notice,
            silence_s=self._options.worker_silence_s,
        )
        try:
            await self._restore(process)
        except BaseException as error:
            if isinstance(error, WorkerError) and not process.alive:
                return process
            await process.stop()
            raise
        return process

    async def _restore(self, process: WorkerProcess) -> None:
        await process.call(
            "open",
            descriptor=self._descriptor.model_dump(mode="json"),
            directory=str(self._files.directory.path),
            device=self._options.device,
            threads=self._options.threads,
            micro_batch_size=self._options.micro_batch_size,
            dummy_delay_s=self._options.dummy_delay_s,
            allowed_tasks=list(self._options.allowed_tasks),
        )
        if self._base is None:
            return
        await process.call("load", **self._load_arguments(*self._base))
        for closed, paths in self._applied:
            await process.call(
                "close", closed=_closed.dump_python(closed, mode="json"), paths=[str(p) for p in paths]
            )
