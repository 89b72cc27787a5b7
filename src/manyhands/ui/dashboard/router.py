"""The dashboard's routes: its pages and assets, and the read-only JSON and event stream that they live on.

Nothing is fetched from the internet and nothing is built: the assets are the files in `static/`, read once and sent
under a Content-Security-Policy that allows only them. The pages steer nothing; actions need the operator's key and
belong to the server. The streams end by themselves when the reader goes; a server that stops must give uvicorn a
`timeout_graceful_shutdown`, since an open stream has no end of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Protocol

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from manyhands.errors import Refused
from manyhands.node.view import RunSummary, RunView

BEAT_S = 5.0
"""A stream in which nothing changes sends a beat so often; the page takes twelve silent seconds for a loss."""
MIN_INTERVAL_S = 0.2
"""Between two views of one stream."""

_STATIC = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml", ".html": "text/html"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Source(Protocol):
    """Where the dashboard gets what it shows. All calls are made on the server's event loop and must not block."""

    def runs(self) -> Sequence[RunSummary]: ...

    def run(self, run_id: str) -> RunView:
        """Raises Refused where there is no such run."""
        ...

    def changes(self, run_id: str) -> AsyncIterator[RunView]:
        """The run's view after each change; changes while the reader is busy count as one. Ends with the run's
        server. Raises Refused where there is no such run."""
        ...


def dashboard_router(source: Source) -> APIRouter:
    """Pages (/, /runs/{id}), /assets/*, and GET /api/runs, /api/runs/{id}, /api/runs/{id}/changes."""
    router = APIRouter()
    files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in sorted(_STATIC.iterdir())}

    def file(name: str, request: Request) -> Response:
        found = files.get(name)
        if found is None:
            return Response("no such file\n", 404, headers=_HEADERS, media_type="text/plain")
        body, media_type = found
        tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        headers = {**_HEADERS, "ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=media_type)

    @router.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return file("index.html", request)

    @router.get("/runs/{run_id}", include_in_schema=False)
    async def run_page(run_id: str, request: Request) -> Response:  # noqa: ARG001 - the page reads it from its address
        return file("run.html", request)

    @router.get("/assets/{name}", include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        return file(name, request)

    _add_api(router, source)
    return router


def _add_api(router: APIRouter, source: Source) -> None:
    headers = {**_HEADERS, "Cache-Control": "no-store"}

    def refused(error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, 404, headers=headers)

    @router.get("/api/runs")
    async def runs() -> Response:
        return JSONResponse([run.model_dump(mode="json") for run in source.runs()], headers=headers)

    @router.get("/api/runs/{run_id}")
    async def run(run_id: str) -> Response:
        try:
            view = source.run(run_id)
        except Refused as error:
            return refused(error)
        return JSONResponse(view.model_dump(mode="json"), headers=headers)

    @router.get("/api/runs/{run_id}/changes")
    async def changes(
        run_id: str,
        from_round: Annotated[int, Query(ge=0)] = 0,
        from_incident: Annotated[int, Query(ge=0)] = 0,
    ) -> Response:
        try:
            first = source.run(run_id)
            coming = source.changes(run_id)
        except Refused as error:
            return refused(error)
        stream = _stream(first, coming, from_round, from_incident)
        return StreamingResponse(
            stream, media_type="text/event-stream", headers={**headers, "X-Accel-Buffering": "no"}
        )


async def _stream(
    view: RunView, coming: AsyncIterator[RunView], from_round: int, from_incident: int
) -> AsyncIterator[bytes]:
    """Server-sent events: `view` with what is new since the one before, `beat` while nothing changes."""
    waiting: asyncio.Task[RunView] | None = None
    try:
        while True:
            yield _event("view", view.since(from_round, from_incident).model_dump(mode="json"))
            from_round = max(from_round, view.rounds[-1].round + 1 if view.rounds else 0)
            from_incident = max(from_incident, len(view.incidents))
            await asyncio.sleep(MIN_INTERVAL_S)
            waiting = asyncio.ensure_future(anext(coming))
            while not (await asyncio.wait({waiting}, timeout=BEAT_S))[0]:
                yield _event("beat", None)
            view = waiting.result()
    except StopAsyncIteration:
        return
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.wait({waiting})
        if isinstance(coming, AsyncGenerator):
            await coming.aclose()


def _event(name: str, data: object) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False, allow_nan=False)}\n\n".encode()
