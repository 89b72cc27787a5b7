"""From a plan to a run: materials made once, by a worker process, and named in a signed descriptor.

A plan that is started again under the same run id finds its run; another plan under that id is refused.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from manyhands.coordination.types import BlobRef
from manyhands.errors import PlanError, WorkerError
from manyhands.identity.keys import Identity
from manyhands.network.blobs.store import BlobStore
from manyhands.node.worker_process import WorkerProcess
from manyhands.plan.descriptor import Material, Parameter, RunDescriptor
from manyhands.plan.resolve import PLAN_FILE, dump_plan, new_run_id, plan_hash
from manyhands.plan.schema import Plan
from manyhands.plan.signing import sign_descriptor
from manyhands.storage.blob_index import BlobIndex
from manyhands.storage.database import Database
from manyhands.storage.runs import StoredRun, create_run, list_runs


def find_run(database: Database, plan: Plan, run_id: str | None) -> StoredRun | None:
    """The run that this plan has started before: by run id, else the latest unfinished one of the same plan.

    Raises PlanError when the run id belongs to another plan.
    """
    wanted = run_id or plan.run_id
    digest = plan_hash(plan)
    same: StoredRun | None = None
    for stored in list_runs(database):
        descriptor = RunDescriptor.model_validate_json(stored.descriptor)
        if wanted is not None and stored.run_id == wanted:
            if descriptor.plan_hash != digest:
                raise PlanError(
                    f"run '{wanted}' exists with another plan ({descriptor.plan_hash[:16]}..., this one is "
                    f"{digest[:16]}...). A run's plan cannot change: choose another --run-id."
                )
            return stored
        if wanted is None and descriptor.plan_hash == digest and stored.phase not in ("finished", "failed"):
            same = stored
    return same


async def prepare_run(
    database: Database,
    blobs: BlobStore,
    identity: Identity,
    plan: Plan,
    run_id: str | None,
    runs: Path,
    allowed_tasks: Sequence[str] = (),
) -> str:
    """Make a new run and store it; returns its id. Raises DataError, PlanError; then nothing of it is left.

    After a WorkerError the worker's log is left.
    """
    run_id = run_id or plan.run_id or new_run_id(plan)
    place = runs / run_id
    fresh = not place.exists()
    work = place / "server" / "preparation"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        made = await _made(plan, work, allowed_tasks)
        await _store(database, blobs, identity, plan, run_id, made)
    except BaseException as error:
        if fresh and not isinstance(error, WorkerError):
            shutil.rmtree(place, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return run_id


def keep_plan(directory: Path, plan: Plan) -> None:
    """Write the plan where the run's checkpoints will be: who evaluates one needs no database."""
    aside = directory / f"{PLAN_FILE}.part"
    aside.write_text(dump_plan(plan), encoding="utf-8")
    aside.replace(directory / PLAN_FILE)


async def _made(plan: Plan, work: Path, allowed_tasks: Sequence[str]) -> dict[str, Any]:
    """Materials and first snapshot as files in `work`, and what the descriptor says of them."""
    worker = await WorkerProcess.start(
        "manyhands.node.workers.prepare_worker",
        log=work.parent / "logs" / "prepare.log",
        silence_s=None,  # it may be at one step of a large text for minutes, and a person waits beside it
    )
    try:
        made: dict[str, Any] = await worker.call(
            "prepare",
            plan=plan.model_dump(mode="json"),
            directory=str(work),
            allowed_tasks=list(allowed_tasks),
        )
        return made
    finally:
        await worker.stop()


async def _store(
    database: Database,
    blobs: BlobStore,
    identity: Identity,
    plan: Plan,
    run_id: str,
    made: dict[str, Any],
) -> None:
    refs: dict[str, BlobRef] = {}
    for name, path in {**made["materials"], "": made["first_snapshot"]}.items():
        refs[name] = await asyncio.to_thread(blobs.put_file, Path(path), move=True)
    first = refs.pop("")
    descriptor = RunDescriptor(
        run_id=run_id,
        plan=plan,
        plan_hash=plan_hash(plan),
        samples=made["samples"],
        parameters=tuple(Parameter.model_validate(p) for p in made["parameters"]),
        materials={name: Material(blob=r.blob, size_bytes=r.size_bytes) for name, r in refs.items()},
        first_snapshot=Material(blob=first.blob, size_bytes=first.size_bytes),
        first_fingerprint=made["fingerprint"],
        server_key=identity.public,
    )
    text = descriptor.model_dump_json()
    await asyncio.to_thread(
        create_run, database, run_id, text.encode(), sign_descriptor(identity, descriptor)
    )
    index = BlobIndex(database, run_id)
    for ref in refs.values():
        await asyncio.to_thread(index.add, ref, "material")
    await asyncio.to_thread(index.add, first, "snapshot", round=0)
