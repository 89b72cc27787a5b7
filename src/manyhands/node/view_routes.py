"""The routes that views read: GET /api/runs, /api/runs/{id} and /api/runs/{id}/changes, over a Source.

A stream ends when its reader goes; a server that stops must give uvicorn a `timeout_graceful_shutdown`, since an
open stream has no end of its own. Nothing here changes anything, and nothing here needs a key: it is what the
dashboard shows.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Annotated, Protocol

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, StreamingResponse

from manyhands.errors import Refused
from manyhands.node.view import RunSummary, RunView

BEAT_S = 5.0
"""A stream in which nothing changes sends a beat so often; a page takes twelve silent seconds for a loss."""
MIN_INTERVAL_S = 0.2
"""Between two views of one stream."""
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
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


def read_routes(source: Source) -> APIRouter:
    router = APIRouter()

    def refused(error: Refused) -> Response:
        return JSONResponse({"error": str(error)}, 404, headers=_HEADERS)

    @router.get("/api/runs")
    async def runs() -> Response:
        return JSONResponse([run.model_dump(mode="json") for run in source.runs()], headers=_HEADERS)

    @router.get("/api/runs/{run_id}")
    async def run(run_id: str) -> Response:
        try:
            view = source.run(run_id)
        except Refused as error:
            return refused(error)
        return JSONResponse(view.model_dump(mode="json"), headers=_HEADERS)

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
            stream, media_type="text/event-stream", headers={**_HEADERS, "X-Accel-Buffering": "no"}
        )

    return router


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
