"""The client node: takes part in one run, from the sign-in to the run's end.

It holds the connection, moves blobs and keeps the order of things; a worker process does all that needs torch.
Two tasks: one reads the connection, the other handles deliveries one after the other; the current piece of work
runs beside them. A worker that dies is started again from the last snapshot and the closings since; the
connection, and with it the place in the run, is kept. What one task cannot go on from ends the program, with the
exit code of its error. Starting over drops everything of the old session: work, deliveries, intents.
"""

from __future__ import annotations

import asyncio
import platform
import time
from typing import Any, cast

from manyhands.config import runs_directory
from manyhands.coordination.effects import (
    Abandon,
    CatchUp,
    Closed,
    Dismissed,
    PhaseChanged,
    Reveal,
    TakeSnapshot,
    Work,
)
from manyhands.coordination.events import Fingerprinted, Left, Ready
from manyhands.errors import (
    BlobError,
    Interrupted,
    ManyhandsError,
    ProtocolError,
    Refused,
    StorageError,
    UpdateError,
)
from manyhands.identity.canonical import verify_document
from manyhands.identity.known_servers import pin
from manyhands.network.connection import Connection, Terms
from manyhands.network.messages import PUBLISHED_DOMAIN, Deliver, Progress, published
from manyhands.node.client.contributor import Contributor
from manyhands.node.client.files import ClientFiles
from manyhands.node.client.options import ClientOptions
from manyhands.node.client.worker import ClientWorker
from manyhands.node.directories import ParticipantDirectory
from manyhands.node.event_loop import run
from manyhands.node.signals import stop_requested
from manyhands.node.view import ClientEvent
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.safety import check_runnable
from manyhands.plan.signing import verify_descriptor


def join(options: ClientOptions) -> None:
    """Take part in a run until it is finished. Blocks; raises the ManyhandsError that ended it, or Interrupted."""
    run(ClientNode(options).run())


class ClientNode:
    """See the module. `round` is what this client's public has seen: so many closings."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self._deliveries: asyncio.Queue[Deliver] = asyncio.Queue()
        self.connection = Connection(
            terms=Terms(
                address=options.server_addr,
                run_id=options.run_id,
                identity=options.identity,
                label=options.label or platform.node()[:64],
                check_server=self._check_server,
            ),
            on_state=lambda state, text: self.tell(state, text),
            patient=options.patient,
            progress=self._heartbeat,
        )
        self._working: dict[str, object] = {}
        self.round: int | None = None
        self.descriptor: RunDescriptor
        self.files: ClientFiles
        self.worker: ClientWorker
        self.contributor: Contributor

    def _check_server(self, key: str) -> None:
        """Against --server-key, or what was noted at the first contact."""
        if pin(self.options.server_addr, key, given=self.options.server_key):
            self.tell("first_contact", f"first contact with {self.options.server_addr}: noted its key {key}")

    def tell(self, kind: str, text: str = "", **facts: Any) -> None:
        """An event for whoever watches this client."""
        event: ClientEvent = {
            "v": 1,
            "ms": time.time_ns() // 1_000_000,
            "kind": kind,
            "text": text,
            "run_id": self.options.run_id,
            "client": self.options.identity.public,
        }
        event.update(cast(ClientEvent, facts))
        self.options.on_event(event)

    def fail(self, error: BaseException) -> None:
        """End the program with this error."""
        if not self._failed.done():
            self._failed.set_exception(error)

    # ------------------------------------------------------------------ life
    async def run(self) -> None:
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        key8 = self.options.identity.public[:8]
        path = self.options.directory or runs_directory() / self.options.run_id / key8
        with ParticipantDirectory(path) as directory:
            self.files = ClientFiles(directory)
            self.connection.plan_hash = self.files.plan_hash()
            stop = stop_requested()
            reading = asyncio.create_task(self._read())
            handling = asyncio.create_task(self._handle_all())
            stopping = asyncio.create_task(stop.wait())
            tasks: set[asyncio.Future[Any]] = {reading, handling, stopping, self._failed}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if stopping in done:
                    await self._leave()
                    raise Interrupted("stopped by a signal; start the same command again to go on")
                for task in (handling, self._failed, reading):
                    if task in done:
                        task.result()
                if self.connection.finished:
                    self.tell("finished", self.connection.finished, state="finished")
            finally:
                await self.connection.beat()  # the last word on what went up and down
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if hasattr(self, "worker"):
                    await self.contributor.end_work(counted=False)
                    await self.worker.stop()
                await self.connection.close()
                if (
                    self.files.plan_hash() is None
                ):  # the server has never let it in: nothing was done for this run
                    directory.remove()

    async def _leave(self) -> None:
        self.tell("leaving", "leaving the run")
        if self.connection.welcome is None:
            return
        left = Left(client=self.options.identity.public, how="left", reason="stopped by its owner")
        try:
            async with asyncio.timeout(2.0):
                await self.connection.ask(left)
        except (TimeoutError, ManyhandsError):
            self.tell("leaving", "the server did not hear the good-bye; it will notice by itself")

    async def _read(self) -> None:
        async for delivery in self.connection.deliveries():
            self._deliveries.put_nowait(delivery)

    async def _handle_all(self) -> None:
        await self.connection.until_connected()
        await self._open_run()
        while True:
            if await self._handle(await self._deliveries.get()):
                return

    async def _open_run(self) -> None:
        """Check the descriptor, fetch the materials, start the worker."""
        welcome = self.connection.welcome
        assert welcome is not None, "connected without a welcome"
        self.descriptor = verify_descriptor(welcome.descriptor, welcome.signature, self.connection.server)
        if self.descriptor.run_id != self.options.run_id:
            raise Refused(
                f"the server answered with run '{self.descriptor.run_id}' for '{self.options.run_id}'"
            )
        check_runnable(self.descriptor.plan, self.options.allowed_tasks)
        self.files.remember_plan(self.descriptor.plan_hash)
        self.connection.plan_hash = self.descriptor.plan_hash
        self.tell(
            "joined",
            f"joined run {self.descriptor.run_id}",
            state="catching up",
            total_rounds=self.descriptor.plan.rounds.total,
        )
        for name, material in self.descriptor.materials.items():
            await self.files.fetch_material(self.connection, name, material.blob, material.size_bytes)
        self.contributor = Contributor(self)
        self.worker = ClientWorker(
            self.descriptor, self.files, self.options, self._progress, self._worker_says, self._worker_died
        )
        await self.worker.start()

    def _worker_died(self, words: str) -> None:
        self.tell("worker_died", f"{words}\nstarting it again", level="warning")

    def _worker_says(self, event: dict[str, Any]) -> None:
        """Of its loggers, or norms of its tensors."""
        if event["kind"] == "warning":
            self.tell("warning", event["text"], level="warning")
        else:
            self.tell(event["kind"], step=event["step"], tensors=event["tensors"])

    def _progress(self, facts: dict[str, object]) -> None:
        """From the worker, several times a second at most."""
        work = self.contributor.current
        if work is None:  # it was given up meanwhile
            return
        unit = facts.pop("unit", None)  # others count alike
        self._working = {**facts, "round": work.assignment.round}
        event: dict[str, Any] = {
            "round": work.assignment.round,
            "steps_done": facts.get("step"),
            "steps": facts.get("steps"),
            "loss": facts.get("loss"),
            "tokens_per_s": facts.get("tokens_per_s"),
            "unit": unit,
            "bytes_up": self.files.bytes_up,
            "bytes_down": self.files.bytes_down,
        }
        self.tell("progress", state="working", **event)

    def _heartbeat(self) -> Progress:
        """What the next one says: of the latest work, and all that went up and down."""
        sizes = {"bytes_up": self.files.bytes_up, "bytes_down": self.files.bytes_down}
        return Progress.model_validate({**self._working, **sizes})

    # ------------------------------------------------------------------ deliveries
    async def _handle(self, delivery: Deliver) -> bool:
        """True when the run is over."""
        body = delivery.body
        if isinstance(body, Closed | CatchUp):
            self._check_signature(body, delivery.signature)
        match body:
            case CatchUp():
                await self._catch_up(body)
            case Work():
                await self.contributor.begin(body)
            case Abandon():
                self.contributor.abandon(body.assignment)
            case Closed():
                await self._close(body)
            case Reveal():
                for contribution in body.contributions:
                    await self.contributor.witness(contribution)
            case TakeSnapshot():
                await self.contributor.take_snapshot(body.round)
            case PhaseChanged():
                return self._phase(body)
            case Dismissed():
                if body.final:
                    raise Refused(f"dismissed from the run: {body.reason}")
                self.tell("dismissed", body.reason)
                await self._start_over()
        return False

    def _check_signature(self, body: Closed | CatchUp, signature: str) -> None:
        document = published(self.options.run_id, body)
        if not verify_document(self.connection.server, PUBLISHED_DOMAIN, document, signature):
            what = "a snapshot" if isinstance(body, CatchUp) else f"the closing of round {body.closing.round}"
            raise Refused(f"{what} of run '{self.options.run_id}' does not carry the server's signature")

    def _phase(self, body: PhaseChanged) -> bool:
        self.tell("phase", f"the run is {body.phase.replace('_', ' ')}: {body.reason}", phase=body.phase)
        if body.phase == "failed":
            raise ManyhandsError(f"the run has failed: {body.reason}")
        if body.phase == "finished":
            self.tell("finished", "the run is finished", state="finished")
        return body.phase == "finished"

    async def _catch_up(self, body: CatchUp) -> None:
        """Public from a snapshot, unless what is held will do, and the closings since.

        A snapshot is loaded even by who holds that round: then its public has turned out to be a wrong one.
        """
        await self.contributor.end_work(counted=False)
        overtaken = self.round is not None and self.round > body.round
        if body.snapshot is not None and not overtaken:
            self.tell(
                "catching_up", f"loading the snapshot at round {body.snapshot.round}", state="catching up"
            )
            path = await self.files.fetch(self.connection, body.snapshot.blob)
            try:
                await self.worker.load(body.snapshot, path, body.earlier)
            except (BlobError, UpdateError, StorageError) as error:
                path.unlink(missing_ok=True)
                raise BlobError(f"{error}. It was deleted here; start again to fetch it anew") from error
            self.round = body.snapshot.round
        for closed in body.closed:
            if not await self._apply(closed):
                return
        if self.round is None:
            raise ProtocolError("the server sent no snapshot to a client that holds nothing: report this")
        self.connection.has_round = self.round
        await self._say_ready()

    async def _close(self, closed: Closed) -> None:
        if self.round is None or closed.closing.round < self.round:
            return
        counted = any(c.client == self.options.identity.public for c in closed.closing.counted)
        await self.contributor.end_work(counted=counted)
        if not await self._apply(closed):
            return
        self.tell("closed", state="waiting", round=closed.closing.round, counted=len(closed.closing.counted))
        await self._say_ready()

    async def _apply(self, closed: Closed) -> bool:
        """Apply one closing to public. False if this client has to start over from a snapshot."""
        number = closed.closing.round
        if self.round is None or number < self.round:
            return True
        if number > self.round:
            self.tell("behind", f"round {self.round} is missing before round {number}: catching up")
            await self._start_over()
            return False
        try:
            paths = await self.files.fetch_closed(self.connection, closed)
        except (BlobError, Refused) as error:  # deleted meanwhile: there is a newer snapshot
            self.tell("behind", f"round {number} cannot be fetched any more: {error}", level="warning")
            self.round = None
            await self._start_over()
            return False
        held = await self.worker.close(closed, paths)
        self.round = number + 1
        self.connection.has_round = self.round
        mesh = self.descriptor.plan.topology == "mesh"
        differs = closed.held not in (None, held)
        if mesh or differs:
            me = self.options.identity.public
            report = Fingerprinted(
                client=me, round=number, fingerprint=held.public, outer_fingerprint=held.outer
            )
            await self.connection.ask(report)
        if differs:
            self.tell("drift", f"what is held differs from the run's after round {number}: fetching it anew")
            for path in paths:  # one of them may be damaged here
                path.unlink(missing_ok=True)
            self.round = None
            await self._start_over()
            return False
        return True

    async def _start_over(self) -> None:
        """Join anew with what is held. Nothing that was delivered to the old session is handled any more."""
        await self.contributor.end_work(counted=False)
        while not self._deliveries.empty():
            self._deliveries.get_nowait()
        await self.connection.start_over(self.round)

    async def _say_ready(self) -> None:
        assert self.round is not None
        await self.connection.ask(Ready(client=self.options.identity.public, round=self.round))
