"""The client's worker, kept alive: started, and after a death started again where it was. With several devices it
is a group of processes (node/worker_group.py), which live and die together.

`base` and `applied` are enough to make the worker's public anew: a snapshot on disk and the closings since. The
client's local state is on disk too (the worker saves it after each work), so a death costs the work under way and
nothing else. Calls may overlap; a death is one death for all of them, and whoever notices first starts anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.effects import Closed, Work
from manyhands.coordination.types import Claims, Closing, Held, Snapshot
from manyhands.engine.settings import Logging
from manyhands.errors import ManyhandsError, PlanError, WorkerError
from manyhands.node.client.files import ClientFiles
from manyhands.node.client.options import ClientOptions
from manyhands.node.worker_group import WorkerGroup
from manyhands.plan.descriptor import RunDescriptor

RESTARTS = 5
RESTART_WINDOW_S = 600.0
FINISH_S = 40.0
"""What loggers may take to write what they have, at the end; they know a limit of their own."""
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
        on_event: Callable[[dict[str, Any]], None],
        on_death: Callable[[str], None],
    ) -> None:
        self._descriptor = descriptor
        self._files = files
        self._options = options
        self._on_progress, self._on_event = on_progress, on_event
        self._on_death = on_death
        self._starting = asyncio.Lock()
        self._group: WorkerGroup | None = None
        self._deaths: list[float] = []
        self._base: tuple[Snapshot, Path] | None = None
        self._applied: list[tuple[Closed, list[Path]]] = []
        self._closings: deque[Closing] = deque(maxlen=REMEMBERED_CLOSINGS)

    @property
    def pid(self) -> int | None:
        return self._group.pid if self._group is not None else None

    async def start(self) -> None:
        """Start the process and open the run in it."""
        await self._living()

    async def stop(self) -> None:
        """End it, once its loggers have written what they have."""
        if self._group is None:
            return
        if self._options.logging.wandb_project is not None:
            with contextlib.suppress(TimeoutError, ManyhandsError):
                async with asyncio.timeout(FINISH_S):
                    await self._group.call("finish")
        await self._group.stop()

    def abandon(self, assignment: str) -> None:
        if self._group is not None:
            self._group.abandon(assignment)

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
        claims = await self._call_all("work", work=_work.dump_python(work, mode="json"), path=str(path))
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
        if "event" in notice:
            self._on_event(notice["event"])

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
        """At rank 0."""
        return await self._tried(lambda group: group.call(operation, **arguments))

    async def _call_all(self, operation: str, **arguments: Any) -> Any:
        """At every rank, together."""
        return await self._tried(lambda group: group.call_all(operation, **arguments))

    async def _tried(self, ask: Callable[[WorkerGroup], Awaitable[Any]]) -> Any:
        while True:
            group = await self._living()
            try:
                return await ask(group)
            except WorkerError:
                if group.alive:  # the operation failed, not the process
                    raise

    async def _living(self) -> WorkerGroup:
        """The processes; after a death new ones, with the public of the old ones. Raises WorkerLost."""
        async with self._starting:
            while self._group is None or not self._group.alive:
                if self._group is not None:
                    self._count_death(self._group.last_words())
                    await self._group.stop()
                self._group = await self._started()
            return self._group

    def _count_death(self, words: str) -> None:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < RESTART_WINDOW_S] + [now]
        if len(self._deaths) > RESTARTS:
            raise WorkerLost(
                f"the worker died {len(self._deaths)} times in ten minutes; the last time: {words}"
            )
        self._on_death(words)

    async def _started(self) -> WorkerGroup:
        """New processes that hold what the last ones held; they may have died again by the time they are returned."""
        options = self._options
        dummy = self._descriptor.plan.task.name == "dummy"
        size = options.data_parallelism * options.tensor_parallelism
        if dummy and size > 1:
            raise PlanError(
                f"the run's task is 'dummy', which has no model that {size} processes could share: leave out "
                "--data-parallelism and --tensor-parallelism"
            )
        if dummy and options.logging != Logging():
            raise PlanError(
                "the run's task is 'dummy', which trains nothing that could be reported: leave out "
                "--optim-stats-steps and --wandb-project"
            )
        group = await WorkerGroup.start(
            f"manyhands.node.workers.{'dummy' if dummy else 'client'}_worker",
            size,
            directory=self._files.directory.path,
            log=self._files.logs / "worker.log",
            on_notice=self._notice,
            silence_s=options.worker_silence_s,
        )
        try:
            await self._restore(group)
        except BaseException as error:
            if isinstance(error, WorkerError) and not group.alive:
                return group
            await group.stop()
            raise
        return group

    async def _restore(self, group: WorkerGroup) -> None:
        await group.call_all(
            "open",
            descriptor=self._descriptor.model_dump(mode="json"),
            directory=str(self._files.directory.path),
            device=self._options.device,
            threads=self._options.threads,
            micro_batch_size=self._options.micro_batch_size,
            data_parallelism=self._options.data_parallelism,
            tensor_parallelism=self._options.tensor_parallelism,
            meeting=str(group.meeting),
            rank_timeout_s=self._options.rank_timeout_s,
            logging=self._options.logging.model_dump(mode="json"),
            dummy_delay_s=self._options.dummy_delay_s,
            allowed_tasks=list(self._options.allowed_tasks),
        )
        if self._base is None:
            return
        await group.call("load", **self._load_arguments(*self._base))
        for closed, paths in self._applied:
            await group.call(
                "close", closed=_closed.dump_python(closed, mode="json"), paths=[str(p) for p in paths]
            )
