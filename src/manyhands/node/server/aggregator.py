"""The aggregator of a star, as the server sees it: a worker process, and what it is told.

It is told what coordination decides (Merge, Advance, TakeSnapshot) and its answers become events. When it dies it
is started again and told the situation anew: the accepted updates of the open round in their order, then the
rest; what it had advanced durably before its death it recognizes and answers as it did. What it does only to have its
sum again is no event.

With everything goes the fingerprint that the coordinator knows. A directory that does not have it, because it was
lost or exchanged, pauses the run with the reason; when an operator resumes the run, it is looked at again.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.effects import Advance, Body, Merge, TakeSnapshot
from manyhands.coordination.events import Advanced, Failed, PauseAsked, SnapshotStored, Verdict
from manyhands.coordination.newcomers import fingerprint_at
from manyhands.coordination.situations import situation
from manyhands.coordination.types import AGGREGATOR, Closing, Fingerprint, Snapshot
from manyhands.errors import BlobError, ManyhandsError, StorageError, UpdateError
from manyhands.node.server.served_run import ServedRun
from manyhands.node.worker_process import WorkerProcess

RESTARTS = 5
RESTART_WINDOW_S = 600.0

_closing = TypeAdapter(Closing)
log = logging.getLogger(__name__)


class _Unusable(ManyhandsError):
    """The aggregator's directory or disk: trying again would change nothing."""


class Aggregator:
    """`run` goes on until it is cancelled or the run is over, or until the worker has died or failed too often: then
    the run has failed. What an update does wrong is a verdict and no failure of the aggregator's."""

    def __init__(self, run: ServedRun, silence_s: float) -> None:
        self._run, self._silence_s = run, silence_s
        self._worker: WorkerProcess | None = None

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker is not None else None

    async def run(self) -> None:
        failures: list[float] = []
        while self._run.driver.state.phase not in ("finished", "failed"):
            try:
                await self._serve()
                return
            except StorageError:
                raise  # the log cannot be written, or the disk: the server's failure
            except _Unusable as error:
                await self._pause(str(error))
            except ManyhandsError as error:
                log.error("the aggregator of %s: %s", self._run.run_id, error)
                now = time.monotonic()
                failures = [at for at in failures if now - at < RESTART_WINDOW_S] + [now]
                if len(failures) > RESTARTS:
                    reason = f"the aggregator failed {len(failures)} times in ten minutes: {error}"
                    await self._run.driver.submit(Failed(reason=reason[:1000]))
                    return

    async def _pause(self, why: str) -> None:
        """Until an operator resumes the run. The log names the directory; the reason, which clients hear, not."""
        driver = self._run.driver
        log.error("the aggregator of %s cannot go on, the run is paused: %s", self._run.run_id, why)
        reason = f"the aggregator cannot go on: {why.replace(str(self._directory), 'its directory')}"
        await driver.submit(PauseAsked(reason=reason[:1000]))
        async with driver.changed:
            await driver.changed.wait_for(lambda: driver.state.phase != "paused")

    @property
    def _directory(self) -> Path:
        return self._run.directory / "aggregator"

    async def _serve(self) -> None:
        run = self._run
        self._worker = worker = await WorkerProcess.start(
            "manyhands.node.workers.aggregator_worker",
            log=run.directory / "logs" / "aggregator.log",
            silence_s=self._silence_s,
        )
        try:
            await self._open(worker)
            await self._carry_out(worker)
        finally:
            await worker.stop()

    async def _open(self, worker: WorkerProcess) -> None:
        run, state = self._run, self._run.driver.state
        open_round, latest = state.rounds.get(state.closed_rounds), state.snapshots[-1]
        closing = None if open_round is None else open_round.closing
        await _call(
            worker,
            "open",
            descriptor=run.descriptor.model_dump(mode="json"),
            directory=str(self._directory),
            first_public=str(run.blobs.path(run.descriptor.first_snapshot.blob)),
            round_number=state.closed_rounds,
            fingerprint=fingerprint_at(state, state.closed_rounds),
            closing=None if closing is None else _closing.dump_python(closing, mode="json"),
            snapshot=str(run.blobs.path(latest.blob.blob)) if latest.round == state.closed_rounds else None,
        )

    async def _carry_out(self, worker: WorkerProcess) -> None:
        driver = self._run.driver
        mailbox = driver.subscribe(AGGREGATOR)
        try:
            # No await between subscribe and situation: nothing falls between.
            for body in situation(driver.state, AGGREGATOR):
                await self._do(worker, body)
            while (delivery := await mailbox.get()) is not None:
                await self._do(worker, delivery.body)
        finally:
            driver.unsubscribe(mailbox)

    async def _do(self, worker: WorkerProcess, body: Body) -> None:
        match body:
            case Merge():
                await self._merge(worker, body)
            case Advance():
                await self._advance(worker, body.closing)
            case TakeSnapshot():
                await self._snapshot(worker, body.round)
            case _:
                raise AssertionError(f"{body.kind} is not for the aggregator")

    def _public_at(self, closings: int) -> Fingerprint | None:
        return fingerprint_at(self._run.driver.state, closings)

    async def _merge(self, worker: WorkerProcess, body: Merge) -> None:
        norm: float | None = None
        reason = ""
        try:
            path = self._run.blobs.path(body.update.blob)
            norm = await _call(
                worker,
                "merge",
                round_number=body.round,
                fingerprint=self._public_at(body.round),
                assignment=body.assignment,
                path=str(path),
                weight=body.weight,
                norm=body.norm,
            )
        except BlobError as error:
            reason = str(error)[:500]
        except UpdateError as error:
            reason = str(error).replace(str(path), "the update")[:500]
        if self._is_open(body):
            await self._judge(body, reason, norm)

    def _is_open(self, body: Merge) -> bool:
        """Whether the coordinator still waits for a verdict: after a restart it has those of what is merged again."""
        round_ = self._run.driver.state.rounds.get(body.round)
        entry = round_.entries.get(body.assignment) if round_ is not None else None
        return entry is not None and entry.status == "opened"

    async def _judge(self, body: Merge, reason: str, norm: float | None) -> None:
        await self._run.driver.submit(
            Verdict(
                by=AGGREGATOR,
                round=body.round,
                assignment=body.assignment,
                accepted=not reason,
                reason=reason,
                norm=norm,
            )
        )

    async def _advance(self, worker: WorkerProcess, closing: Closing) -> None:
        run = self._run
        change = self._directory / f"change-{closing.round}.safetensors"
        answer: dict[str, Any] = await _call(
            worker,
            "advance",
            fingerprint=self._public_at(closing.round),
            closing=_closing.dump_python(closing, mode="json"),
            change_path=str(change),
            paths=[str(run.blobs.path(counted.update.blob)) for counted in closing.counted],
        )
        # The worker keeps its own name for the file until the next advance: it may be asked again.
        aside = change.with_name(f"publish-{closing.round}.safetensors")
        aside.unlink(missing_ok=True)
        os.link(change, aside)
        ref = await run.keep_file(aside, "change", closing.round)
        await run.driver.submit(Advanced(round=closing.round, change=ref, fingerprint=answer["fingerprint"]))

    async def _snapshot(self, worker: WorkerProcess, at: int) -> None:
        run = self._run
        path = self._directory / f"snapshot-{at}.safetensors"
        answer: dict[str, Any] = await _call(
            worker, "snapshot", path=str(path), round_number=at, fingerprint=self._public_at(at)
        )
        if answer["round"] != at:
            return  # asked too late: the round after it has been applied
        blob = await run.keep_file(path, "snapshot", at)
        snapshot = Snapshot(round=at, blob=blob, fingerprint=answer["fingerprint"])
        await run.driver.submit(SnapshotStored(by=AGGREGATOR, snapshot=snapshot))


async def _call(worker: WorkerProcess, operation: str, **arguments: Any) -> Any:
    """The operation's result. What the worker says of its disk is not the server's StorageError."""
    try:
        return await worker.call(operation, **arguments)
    except StorageError as error:
        raise _Unusable(str(error)) from error
