"""A client's contributions: work, commit, open, upload, claim; and in a mesh, witnessing those of the others.

One piece of work at a time, in a task of its own, so that deliveries are handled meanwhile. Whatever the server
refuses because the round has moved on is dropped: the closing says what happened to it. Work that fails is given
back with its reason; what cannot go on at all ends the client (`ClientNode.fail`), rather than to be silent.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from manyhands.coordination.effects import Work
from manyhands.coordination.events import Committed, Contributed, SnapshotStored, Verdict, WorkFailed
from manyhands.coordination.types import Claims, Contribution, Snapshot
from manyhands.errors import BlobError, ManyhandsError, Refused, ServerUnreachable
from manyhands.identity.contributions import commit, new_nonce, sign_contribution
from manyhands.network.blobs.manifest import Manifest, manifest_of
from manyhands.network.messages import MAX_REASON, Opening, SnapshotOffer, plain_text
from manyhands.node.client.files import Attempts
from manyhands.node.client.worker import WorkerLost

if TYPE_CHECKING:
    from pathlib import Path

    from manyhands.node.client.node import ClientNode

FAILURES_IN_A_ROW = 3
"""After so many pieces of work that failed a client ends: it costs the others more than it gives."""


class Contributor:
    """`current` is the assignment being worked on or sent, None between rounds."""

    def __init__(self, node: ClientNode) -> None:
        self._node = node
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._last_begun = ""
        self.current: Work | None = None

    async def begin(self, work: Work) -> None:
        if self.current is not None and self.current.assignment.id == work.assignment.id:
            return  # delivered again
        if self._node.round is None or work.terms.round < self._node.round:
            return  # of a round that has closed meanwhile
        await self.end_work(counted=False)
        if work.assignment.id == self._last_begun:
            # The local state may be behind it already, and nothing could be recorded of a second start.
            await self._give_back(work, "this client was cut off in the middle of it")
            return
        self.current, self._last_begun = work, work.assignment.id
        self._task = asyncio.create_task(self._do(work), name=f"work {work.assignment.id}")
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._node.fail(error)

    def abandon(self, assignment: str) -> None:
        if self.current is not None and self.current.assignment.id == assignment:
            self._node.worker.abandon(assignment)

    async def end_work(self, *, counted: bool) -> None:
        """Be done with the work under way: wait for it if it counted (it was sent then), give it up if not."""
        task, work = self._task, self.current
        if task is None or work is None:
            return
        if not counted and not task.done():
            self._node.worker.abandon(work.assignment.id)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._task = self.current = None

    # ------------------------------------------------------------------ one piece of work
    async def _do(self, work: Work) -> None:
        node, assignment = self._node, work.assignment
        node.tell(
            "work",
            f"round {assignment.round}: {assignment.steps} steps",
            state="working",
            round=assignment.round,
            steps=assignment.steps,
            steps_done=0,
        )
        path = node.files.updates / f"{assignment.id}.safetensors"
        try:
            claims = await node.worker.work(work, path)
            if claims is None:
                return
            node.files.forget_updates(path)
            await self._contribute(work, path, claims)
            node.tell(
                "sent",
                f"round {assignment.round}: update sent"
                + ("" if claims.loss is None else f", loss {claims.loss:.4f}"),
                state="waiting",
                round=assignment.round,
                loss=claims.loss,
                bytes_up=node.files.bytes_up,
                bytes_down=node.files.bytes_down,
            )
            self._failures = 0
        except WorkerLost:
            raise
        except Refused as refusal:
            node.tell("refused", f"round {assignment.round}: {refusal}", level="warning")
        except ManyhandsError as error:
            await self._failed(work, error)
        finally:
            self._keep_or_delete(path)

    async def _failed(self, work: Work, error: ManyhandsError) -> None:
        """Give the work back, with the reason; too many in a row end the client with that error."""
        self._failures += 1
        await self._give_back(work, plain_text(f"{type(error).__name__}: {error}", MAX_REASON))
        if self._failures >= FAILURES_IN_A_ROW:
            raise error

    async def _give_back(self, work: Work, reason: str) -> None:
        node, assignment = self._node, work.assignment
        node.tell("failed", f"round {assignment.round}: {reason}", level="error")
        failed = WorkFailed(client=assignment.client, assignment=assignment.id, reason=reason)
        try:
            await node.connection.ask(failed)
        except Refused as refusal:
            node.tell("refused", f"round {assignment.round}: {refusal}", level="warning")

    def _keep_or_delete(self, path: Path) -> None:
        keep = self._node.options.write_gradients_dir
        if not path.exists():
            return
        if keep is None:
            path.unlink()
            return
        keep.mkdir(parents=True, exist_ok=True)
        os.replace(path, keep / path.name)

    async def _contribute(self, work: Work, path: Path, claims: Claims) -> None:
        node, assignment = self._node, work.assignment
        run_id, key = node.descriptor.run_id, assignment.client
        manifest = await asyncio.to_thread(manifest_of, path)
        update = manifest.ref
        nonce = new_nonce()
        committed = commit(run_id, assignment.round, key, assignment.id, update.blob, nonce)
        await node.connection.ask(
            Committed(client=key, round=assignment.round, assignment=assignment.id, commit=committed)
        )
        node.tell("uploading", state="uploading", round=assignment.round)
        opening = Opening(assignment=assignment.id, round=assignment.round, update=update, nonce=nonce)
        await self._upload(opening, path, manifest)
        contribution = Contribution(
            assignment=assignment.id,
            round=assignment.round,
            client=key,
            commit=committed,
            update=update,
            nonce=nonce,
            claims=claims,
        )
        signature = sign_contribution(node.options.identity, run_id, contribution)
        if node.descriptor.plan.topology == "mesh":
            node.files.adopt(path, update)  # it will be merged here too
        await node.connection.ask(Contributed(contribution=replace(contribution, signature=signature)))

    async def _upload(self, allowed_by: Opening | SnapshotOffer, path: Path, manifest: Manifest) -> None:
        """Upload, over as many sessions as it takes: each has to be told again what is coming."""
        node = self._node
        attempts = Attempts(node.connection)
        while True:
            await attempts.begin()
            await node.connection.ask(allowed_by)
            try:
                return await node.files.send(node.connection, path, manifest)
            except (BlobError, ServerUnreachable, Refused) as error:
                await attempts.failed(error)

    # ------------------------------------------------------------------ mesh
    async def witness(self, contribution: Contribution) -> None:
        """Fetch a revealed update of somebody else, check it, and say what was found, if it was to be had."""
        node = self._node
        if contribution.client == node.options.identity.public:
            return  # nobody judges his own
        if contribution.update is None or contribution.claims is None:
            return
        reason = ""
        try:
            # What the others have decided meanwhile is not to be had any more, and the closing waits behind this.
            path = await node.files.fetch(node.connection, contribution.update, insisting=False)
            found = await node.worker.check(path, contribution.claims.norm)
            reason = found.replace(str(path), "the update")
        except (BlobError, Refused, ServerUnreachable) as error:
            node.tell("refused", f"the update of {contribution.assignment}: {error}", level="warning")
            return
        verdict = Verdict(
            by=node.options.identity.public,
            round=contribution.round,
            assignment=contribution.assignment,
            accepted=not reason,
            reason=plain_text(reason, MAX_REASON),
        )
        try:
            await node.connection.ask(verdict)
        except Refused as refusal:
            node.tell("refused", str(refusal), level="warning")

    async def take_snapshot(self, at: int) -> None:
        """Store public after `at` closings as a blob, if this client is there."""
        node = self._node
        if node.round != at:
            return
        path = node.files.updates / f"snapshot-{at}.safetensors"
        public, outer = await node.worker.snapshot(path)
        try:
            manifest = await asyncio.to_thread(manifest_of, path)
            blob = manifest.ref
            await self._upload(SnapshotOffer(round=at, blob=blob), path, manifest)
            snapshot = Snapshot(round=at, blob=blob, fingerprint=public, outer_fingerprint=outer)
            await node.connection.ask(SnapshotStored(by=node.options.identity.public, snapshot=snapshot))
        except (Refused, BlobError, ServerUnreachable) as error:
            node.tell("refused", f"snapshot at {at}: {error}", level="warning")
        finally:
            path.unlink(missing_ok=True)
