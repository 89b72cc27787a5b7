"""The server's HTTP side: what views read, what the operator orders, and who may touch which blob.

Reading a run's account needs no key (it holds what the dashboard shows); orders are signed by the operator's key,
for this server, within a minute, and each once. Blobs need the token of a client's session.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from manyhands.coordination.events import Left, PauseAsked, ResumeAsked
from manyhands.coordination.types import BlobId
from manyhands.errors import ManyhandsError
from manyhands.identity.canonical import verify_document
from manyhands.network.blobs.routes import Action
from manyhands.node.operator import ORDER_DOMAIN, ORDER_LIFETIME_MS, Order
from manyhands.node.server.limits import bearer_token, declared_bytes
from manyhands.node.server.run_driver import clock_ms
from manyhands.node.server.served_run import ServedRun
from manyhands.node.server.signed_in import Session, Sessions
from manyhands.node.server.views import RunViews


class BlobGuard:
    """Who may read and write blobs: sessions, each for its run, and only what the run lets it."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions

    async def __call__(self, request: Request, action: Action, blob: BlobId, size: int) -> None:
        """Raises HTTPException 401, 403 or 429."""
        session = self._session(request)
        if action == "read":
            if not session.run.may_read(blob):
                raise HTTPException(403, f"blob {blob[:16]}... is not open to this client")
            return
        allowed = session.announced.size_of(blob)
        if allowed is None:
            raise HTTPException(403, f"blob {blob[:16]}... was not announced by this client")
        if size:
            if size != allowed:
                raise HTTPException(
                    403, f"blob {blob[:16]}... was announced with {allowed} bytes, not {size}"
                )
        elif not session.announced.spend(blob, declared_bytes(request.headers)):
            raise HTTPException(
                429, f"far more than {allowed} bytes were sent for blob {blob[:16]}... already"
            )

    def _session(self, request: Request) -> Session:
        token = bearer_token(request.headers.get("authorization", ""))
        session = self._sessions.by_token.get(token)
        if session is None:
            raise HTTPException(401, "no session: sign in first")
        return session


class Orders:
    """What the operator orders, each order once.

    Those of before this server's start are refused: another server may have carried them out.
    """

    def __init__(self, operator_public: str) -> None:
        self._operator, self._since_ms = operator_public, clock_ms()
        self._used: dict[str, int] = {}

    def checked(self, body: bytes, run_id: str) -> Order:
        """Raises HTTPException 400 or 403."""
        try:
            document = json.loads(body)
            order, signature = Order.parse(document["order"], where="order"), str(document["signature"])
        except (ValueError, KeyError, TypeError, ManyhandsError) as error:
            raise HTTPException(400, f"not an order: {error}") from None
        if not verify_document(self._operator, ORDER_DOMAIN, order, signature):
            raise HTTPException(403, "this order is not signed by the operator's key of this server")
        now = clock_ms()
        if order.run_id != run_id or abs(now - order.issued_ms) > ORDER_LIFETIME_MS:
            raise HTTPException(403, "this order is for another run, or too old: are the clocks right?")
        if order.issued_ms < self._since_ms:
            raise HTTPException(403, "this order is older than this server's start: give it again")
        self._used = {nonce: at for nonce, at in self._used.items() if now - at <= 2 * ORDER_LIFETIME_MS}
        if order.nonce in self._used:
            raise HTTPException(403, "this order was carried out already")
        self._used[order.nonce] = now
        return order


def api_routes(runs: Mapping[str, ServedRun], views: RunViews, operator_public: str) -> APIRouter:
    router = APIRouter(prefix="/api")
    orders = Orders(operator_public)

    def run_of(run_id: str) -> ServedRun:
        run = runs.get(run_id)
        if run is None:
            raise HTTPException(404, f"no run '{run_id}' here; runs: {', '.join(sorted(runs)) or 'none'}")
        return run

    @router.get("/runs")
    async def list_runs() -> list[dict[str, Any]]:
        return [(await views.view(run)).summary().model_dump() for run in runs.values()]

    @router.get("/runs/{run_id}")
    async def one_run(run_id: str) -> dict[str, Any]:
        return (await views.view(run_of(run_id))).model_dump()

    @router.get("/runs/{run_id}/ledger")
    async def ledger(run_id: str) -> list[dict[str, Any]]:
        return await views.ledger(run_of(run_id))

    @router.get("/runs/{run_id}/changes")
    async def changes(run_id: str, request: Request) -> StreamingResponse:
        run = run_of(run_id)

        async def lines() -> AsyncIterator[str]:
            async for view in views.changes(run):
                if await request.is_disconnected():
                    return
                yield f"data: {view.model_dump_json()}\n\n" if view is not None else "event: beat\ndata:\n\n"

        return StreamingResponse(
            lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
        )

    @router.post("/runs/{run_id}/orders")
    async def order(run_id: str, request: Request) -> dict[str, str]:
        run = run_of(run_id)
        given = orders.checked(await _small_body(request), run_id)
        return {"done": await _carry_out(run, given)}

    return router


async def _small_body(request: Request) -> bytes:
    body = b""
    try:
        async for part in request.stream():
            body += part
            if len(body) > 16_384:
                raise HTTPException(413, "an order has at most 16 KiB")
    except ClientDisconnect:
        raise HTTPException(400, "an order that was cut off") from None
    return body


async def _carry_out(run: ServedRun, order: Order) -> str:
    driver = run.driver
    match order.action:
        case "pause":
            after = " after its open round" if driver.state.rounds else ""
            await driver.submit(PauseAsked(reason=order.reason or "paused by the operator"))
            return f"run {run.run_id} pauses{after}"
        case "resume":
            await driver.submit(ResumeAsked())
            return f"run {run.run_id} goes on"
        case "kick":
            matching = [key for key in driver.state.clients if key.startswith(order.client)]
            if len(matching) != 1:
                known = ", ".join(key[:8] for key in driver.state.clients) or "none"
                raise HTTPException(404, f"'{order.client}' names {len(matching)} clients; clients: {known}")
            reason = order.reason or "kicked by the operator"
            await driver.submit(Left(client=matching[0], how="kicked", reason=reason))
            return f"client {matching[0][:8]} is out of run {run.run_id}"
