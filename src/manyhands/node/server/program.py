"""The server program: one ASGI application that holds a run's coordinator, blobs, views and orders.

`serve` prepares the run or takes it up again, then serves until a signal. Its keys are made at the first start.
Off loopback it refuses to listen: without TLS nothing of manyhands crosses a network.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, WebSocket
from fastapi.responses import JSONResponse

from manyhands.config import home, runs_directory
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.errors import Refused, ServerUnreachable, StorageError
from manyhands.identity import keys
from manyhands.identity.keys import Identity
from manyhands.network.blobs.routes import blob_routes
from manyhands.network.blobs.store import BlobStore
from manyhands.network.messages import MAX_MESSAGE_BYTES
from manyhands.node.directories import ParticipantDirectory
from manyhands.node.event_loop import run
from manyhands.node.operator import default_key
from manyhands.node.server.aggregator import Aggregator
from manyhands.node.server.evaluator import Evaluator
from manyhands.node.server.http import BlobGuard, api_routes
from manyhands.node.server.limits import END_GRACE_S, Bodies, PromptHttp, PromptWebSocket
from manyhands.node.server.narration import narrate
from manyhands.node.server.preparation import find_run, keep_plan, prepare_run
from manyhands.node.server.retention import forget_old_blobs
from manyhands.node.server.run_driver import RunDriver
from manyhands.node.server.served_run import ServedRun
from manyhands.node.server.sessions import serve_client
from manyhands.node.server.signed_in import Sessions
from manyhands.node.server.views import RunViews
from manyhands.node.signals import stop_requested
from manyhands.node.worker_process import SILENCE_S
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.safety import check_runnable
from manyhands.plan.schema import Plan
from manyhands.storage.blob_index import BlobIndex
from manyhands.storage.database import Database, open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import get_run

DashboardFactory = Callable[[RunViews], APIRouter]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server runs. `on_event` hears plain dicts: what happened, for whoever watches."""

    host: str = "127.0.0.1"
    port: int = 8700
    data_dir: Path | None = None  # database and blobs; default: MANYHANDS_HOME/server
    run_id: str | None = None
    dashboard: DashboardFactory | None = None
    allowed_tasks: tuple[str, ...] = ()
    worker_silence_s: float = SILENCE_S
    """After so long without a sign of life a worker process is killed and started again."""
    on_event: Callable[[dict[str, Any]], None] = field(default=lambda _: None)


def serve(plan: Plan, options: ServerOptions | None = None) -> None:
    """Serve a plan's run until a signal. Blocks. Raises the ManyhandsError that ended it."""
    run(_serve(plan, options or ServerOptions()))


async def _serve(plan: Plan, options: ServerOptions) -> None:
    check_runnable(plan, options.allowed_tasks)
    listening = _listen(options.host, options.port)
    stop = stop_requested()
    data = options.data_dir or home() / "server"
    with listening, ParticipantDirectory(data):
        address = f"{options.host}:{listening.getsockname()[1]}"
        identity = _load_or_create(home() / "keys" / "server.key")
        operator = _load_or_create(default_key())
        database = open_database(data / "manyhands.db")
        blobs = BlobStore(data / "blobs")
        await asyncio.to_thread(blobs.sweep)
        starting = asyncio.create_task(_open_run(database, blobs, identity, plan, options, address))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                return
            await _serve_run(starting.result(), identity, operator, options, listening, stop)
        finally:
            stopping.cancel()
            database.close()


async def _open_run(
    database: Database, blobs: BlobStore, identity: Identity, plan: Plan, options: ServerOptions, address: str
) -> ServedRun:
    """Find or make the run, take its lease, replay its log."""
    runs = runs_directory()
    stored = await asyncio.to_thread(find_run, database, plan, options.run_id)
    if stored is None:
        options.on_event({"kind": "preparing", "text": "preparing the run's data and first weights"})
        run_id = await prepare_run(
            database, blobs, identity, plan, options.run_id, runs, options.allowed_tasks
        )
        stored = await asyncio.to_thread(get_run, database, run_id)
    descriptor = RunDescriptor.model_validate_json(stored.descriptor)
    directory = runs / descriptor.run_id / "server"
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(keep_plan, directory.parent, descriptor.plan)
    first = Snapshot(
        round=0,
        blob=BlobRef(blob=descriptor.first_snapshot.blob, size_bytes=descriptor.first_snapshot.size_bytes),
        fingerprint=descriptor.first_fingerprint,
    )
    driver = RunDriver(RunLog(database, descriptor.run_id), owner=address)
    run = ServedRun(
        run_id=descriptor.run_id,
        descriptor=descriptor,
        descriptor_text=stored.descriptor.decode(),
        descriptor_signature=stored.signature,
        first=first,
        driver=driver,
        blobs=blobs,
        index=BlobIndex(database, descriptor.run_id),
        directory=directory,
    )
    for blob in await asyncio.to_thread(run.index.all):
        if blob.kind != "update":
            run.readable.add(blob.ref.blob)
    await driver.start(descriptor, first)
    return run


async def _serve_run(
    run: ServedRun,
    identity: Identity,
    operator: Identity,
    options: ServerOptions,
    listening: socket.socket,
    stop: asyncio.Event,
) -> None:
    sessions, runs = Sessions(), {run.run_id: run}
    views = RunViews(sessions)
    app = _application(runs, sessions, views, identity, operator, options)
    config = uvicorn.Config(
        app,
        http=PromptHttp,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws=PromptWebSocket,
        ws_max_size=2 * MAX_MESSAGE_BYTES,  # so that who sends a little too much is told so in words
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=int(END_GRACE_S) + 4,
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    programs = {
        asyncio.create_task(Evaluator(run, options.worker_silence_s, options.allowed_tasks).run()),
        asyncio.create_task(forget_old_blobs(run)),
    }
    if run.descriptor.plan.topology == "star":
        programs.add(asyncio.create_task(Aggregator(run, options.worker_silence_s).run()))
    with _uvicorn_without_signals(server):
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        stopping = asyncio.create_task(stop.wait())
        host, port = listening.getsockname()[:2]
        options.on_event(
            {
                "kind": "serving",
                "text": f"serving run {run.run_id} at {host}:{port}",
                "run_id": run.run_id,
                "address": f"{host}:{port}",
                "dashboard": f"http://{host}:{port}/",
                "server_key": identity.public,
            }
        )
        programs.add(asyncio.create_task(narrate(run, views, options.on_event)))
        try:
            await _first_end(stopping, serving, run.driver.failed, programs)
        finally:
            await run.driver.stop()
            server.should_exit = True
            for task in (stopping, *programs):
                task.cancel()
            await asyncio.gather(stopping, *programs, return_exceptions=True)
            await asyncio.gather(serving, return_exceptions=True)


async def _first_end(
    stopping: asyncio.Task[Any],
    serving: asyncio.Task[Any],
    failed: asyncio.Future[None],
    programs: set[asyncio.Task[None]],
) -> None:
    """Wait for a signal; raises what a program or the log has failed with. Programs may end before."""
    waiting: set[asyncio.Future[Any]] = {stopping, serving, failed, *programs}
    while not (stopping.done() or serving.done() or failed.done()):
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for ended in done:
            if ended is not stopping:
                ended.result()


def _application(
    runs: dict[str, ServedRun],
    sessions: Sessions,
    views: RunViews,
    identity: Identity,
    operator: Identity,
    options: ServerOptions,
) -> FastAPI:
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Bodies, known=sessions.by_token.__contains__)
    first = next(iter(runs.values()))
    app.include_router(blob_routes(first.blobs, BlobGuard(sessions)))
    app.include_router(api_routes(runs, views, operator.public))

    @app.exception_handler(StorageError)
    async def unavailable(_: Request, error: StorageError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 503)

    @app.websocket("/connect")
    async def connect(socket: WebSocket) -> None:
        await serve_client(socket, runs, sessions, identity)

    if options.dashboard is not None:
        app.include_router(options.dashboard(views))
    return app


def _load_or_create(path: Path) -> Identity:
    return keys.load(path) if path.exists() else keys.create(path)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises Refused off loopback, ServerUnreachable if the port is taken."""
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServerUnreachable(f"cannot listen at '{host}': {error}") from None
    if not ipaddress.ip_address(info[4][0]).is_loopback:
        raise Refused(
            f"--host {host} is not a loopback address: this version serves loopback only, since its connections "
            "carry no TLS yet. Use 127.0.0.1, and an SSH tunnel for other machines."
        )
    listening = socket.socket(info[0], socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(info[4])
    except OSError as error:
        listening.close()
        raise ServerUnreachable(
            f"cannot listen at {host}:{port}: {error.strerror}. Choose another --port, or end what uses this one."
        ) from None
    listening.listen(256)
    return listening


@contextlib.contextmanager
def _uvicorn_without_signals(server: uvicorn.Server) -> Any:
    """uvicorn would take over SIGINT and SIGTERM; they are ours (signals.py)."""
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    yield
