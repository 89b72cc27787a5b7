"""The evaluator: a worker process of the server's that looks at snapshots, and writes what a person keeps.

It works on immutable snapshots, at low priority, so that it delays nobody; a run goes on without its answers,
except that it is finished only when the last checkpoint is there.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from manyhands.coordination.effects import Body, Evaluate
from manyhands.coordination.events import Checkpointed, Evaluated, Failed
from manyhands.coordination.situations import situation
from manyhands.coordination.types import EVALUATOR
from manyhands.errors import ManyhandsError, WorkerError
from manyhands.node.server.served_run import ServedRun
from manyhands.node.worker_process import WorkerProcess

ATTEMPTS = 3
log = logging.getLogger(__name__)


class Evaluator:
    """Its process is started for the first snapshot and lives as long as the run is served."""

    def __init__(self, run: ServedRun, silence_s: float, allowed_tasks: Sequence[str] = ()) -> None:
        self._run, self._silence_s, self._allowed_tasks = run, silence_s, list(allowed_tasks)
        self._worker: WorkerProcess | None = None

    @property
    def pid(self) -> int | None:
        return self._worker.pid if self._worker is not None else None

    async def run(self) -> None:
        driver = self._run.driver
        mailbox = driver.subscribe(EVALUATOR)
        try:
            for body in situation(driver.state, EVALUATOR):
                await self._do(body)
            while (delivery := await mailbox.get()) is not None:
                await self._do(delivery.body)
        finally:
            driver.unsubscribe(mailbox)
            if self._worker is not None:
                await self._worker.stop()

    async def _do(self, body: Body) -> None:
        assert isinstance(body, Evaluate), f"{body.kind} is not for the evaluator"
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._evaluate(body)
                return
            except ManyhandsError as error:
                if self._run.driver.stopping.is_set():
                    return  # the next start asks for it again
                log.error("evaluation of the snapshot at %d failed: %s", body.snapshot.round, error)
                if attempt == ATTEMPTS and body.checkpoint:
                    reason = f"the checkpoint of round {body.snapshot.round} cannot be written: {error}"
                    await self._run.driver.submit(Failed(reason=reason))
                await asyncio.sleep(0.5 * attempt)

    async def _evaluate(self, body: Evaluate) -> None:
        run = self._run
        worker = await self._started()
        answer: dict[str, Any] = await worker.call(
            "evaluate",
            snapshot=str(run.blobs.path(body.snapshot.blob.blob)),
            round_number=body.snapshot.round,
            checkpoints=str(run.directory.parent / "checkpoints") if body.checkpoint else None,
        )
        if body.snapshot.round not in run.driver.state.evaluations:  # else only the checkpoint is missing
            await run.driver.submit(
                Evaluated(
                    round=body.snapshot.round,
                    loss=answer["loss"],
                    samples=answer["samples"],
                    metrics=answer["metrics"],
                )
            )
        if body.checkpoint:
            await run.driver.submit(Checkpointed(round=body.snapshot.round, path=answer["checkpoint"]))

    async def _started(self) -> WorkerProcess:
        if self._worker is not None and self._worker.alive:
            return self._worker
        run = self._run
        self._worker = await WorkerProcess.start(
            "manyhands.node.workers.evaluator_worker",
            log=run.directory / "logs" / "evaluator.log",
            silence_s=self._silence_s,
        )
        materials = {name: str(run.blobs.path(m.blob)) for name, m in run.descriptor.materials.items()}
        try:
            await self._worker.call(
                "open",
                descriptor=run.descriptor.model_dump(mode="json"),
                directory=str(run.directory / "evaluator"),
                materials=materials,
                allowed_tasks=self._allowed_tasks,
            )
        except WorkerError:
            await self._worker.stop()
            raise
        return self._worker
