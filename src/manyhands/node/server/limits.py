"""How much one peer may ask of a server before the others suffer: the bounds at the door, in one place.

    a connection without a request     HEADERS_TIMEOUT_S, MAX_HEADERS_BYTES
    any connection, at the end         END_GRACE_S
    who has not signed in yet          MAX_SIGNING_IN at a time, SIGN_IN_TIMEOUT_S each; the oldest has to go first
    messages of a session              MESSAGES_PER_S, MESSAGE_BURST at once; what is faster waits, a flood ends it
    blobs that a session announced     MAX_ANNOUNCED at a time, each sent little more than UPLOAD_TIMES
    request bodies of a session        MAX_BODIES at a time

Elsewhere: sizes of messages (network/messages.py), of updates (the plan), of blobs and bodies, and how slowly a body
may come (network/blobs/routes.py), how many clients take part (the plan's membership).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from manyhands.coordination.types import BlobId, BlobRef
from manyhands.errors import ProtocolError, UpdateError
from manyhands.network.blobs.manifest import CHUNK_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

HEADERS_TIMEOUT_S: Final = 10.0
MAX_HEADERS_BYTES: Final = 64 * 1024
END_GRACE_S: Final = 1.0
"""For what is under way when the server ends: a body that does not go on, an answer that nobody reads, is cut off."""
SIGN_IN_TIMEOUT_S: Final = 10.0
MAX_SIGNING_IN: Final = 64
MESSAGES_PER_S: Final = 100.0
"""Sustained. A client's round takes five, in a mesh as many more as there are others; a heartbeat takes one."""
MESSAGE_BURST: Final = 500
MAX_HELD_BACK: Final = 250
"""So many messages in a row that had to wait are a flood."""
MAX_ANNOUNCED: Final = 4
UPLOAD_TIMES: Final = 3
MAX_BODIES: Final = 8
"""Twice what an upload has under way at once."""

_LEAST_COST_BYTES: Final = 1024  # of a request that writes
_SPARE_BYTES: Final = 4 * CHUNK_BYTES


# ------------------------------------------------------------------------------------------- sign-in
class SigningIn:
    """Those who are at the door. When there are too many, whoever has stood there longest has to go: signing in
    takes milliseconds, so that is somebody who does not mean to."""

    def __init__(self, most: int = MAX_SIGNING_IN, timeout_s: float = SIGN_IN_TIMEOUT_S) -> None:
        self._most, self._timeout_s = most, timeout_s
        self._open: dict[asyncio.Timeout, None] = {}  # oldest first

    @asynccontextmanager
    async def one(self) -> AsyncIterator[None]:
        """Around one sign-in. Raises TimeoutError when it takes too long, or has to make room."""
        if len(self._open) >= self._most:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.reschedule(asyncio.get_running_loop().time())
        async with asyncio.timeout(self._timeout_s) as limit:
            self._open[limit] = None
            try:
                yield
            finally:
                self._open.pop(limit, None)


# ------------------------------------------------------------------------------------------- messages
class TokenBucket:
    """`rate_per_s` in the long run, `burst` at once."""

    def __init__(self, rate_per_s: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate_per_s, burst, clock
        self._tokens, self._at = float(burst), clock()

    def take(self) -> float:
        """Take one; the seconds to wait until it is there, 0 if it is there now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1
        self._at = now
        return max(0.0, -self._tokens / self._rate)


class MessageRate:
    """One session's messages. Waiting is enough to slow a sender down: what it sends meanwhile is not read."""

    def __init__(self) -> None:
        self._bucket = TokenBucket(MESSAGES_PER_S, MESSAGE_BURST)
        self._held_back = 0

    async def admit(self) -> None:
        """Wait until one more message may be handled. Raises ProtocolError for a flood."""
        wait_s = self._bucket.take()
        if not wait_s:
            self._held_back = 0
            return
        self._held_back += 1
        if self._held_back > MAX_HELD_BACK:
            raise ProtocolError(
                f"a flood of messages: more than {MESSAGES_PER_S:.0f} in a second, for long; wait for answers"
            )
        await asyncio.sleep(wait_s)


# ------------------------------------------------------------------------------------------- uploads
@dataclass(slots=True)
class _Upload:
    size_bytes: int
    left_bytes: int  # that may still be sent for it


class Announced:
    """The blobs that a session may upload now."""

    def __init__(self) -> None:
        self._uploads: dict[BlobId, _Upload] = {}  # oldest first

    def add(self, ref: BlobRef) -> None:
        """Announce a blob; the oldest is no longer expected when there are too many. Raises UpdateError for one
        that was announced with another size."""
        known = self._uploads.get(ref.blob)
        if known is not None:
            if known.size_bytes != ref.size_bytes:
                raise UpdateError(
                    f"blob {ref.blob[:16]}... was announced with {known.size_bytes} bytes, now with {ref.size_bytes}"
                )
            return
        while len(self._uploads) >= MAX_ANNOUNCED:
            del self._uploads[next(iter(self._uploads))]
        allowance = UPLOAD_TIMES * ref.size_bytes + _SPARE_BYTES
        self._uploads[ref.blob] = _Upload(ref.size_bytes, allowance)

    def size_of(self, blob: BlobId) -> int | None:
        """As announced; None for a blob that was not."""
        upload = self._uploads.get(blob)
        return None if upload is None else upload.size_bytes

    def spend(self, blob: BlobId, body_bytes: int) -> bool:
        """Whether a request with so long a body is within what may be sent for this blob."""
        upload = self._uploads[blob]
        upload.left_bytes -= max(body_bytes, _LEAST_COST_BYTES)
        return upload.left_bytes >= 0

    def done(self, blob: BlobId) -> None:
        self._uploads.pop(blob, None)


def declared_bytes(headers: Mapping[str, str]) -> int:
    """Of a request's body; a chunk's length where the sender does not say."""
    declared = headers.get("content-length", "")
    if declared.isdecimal():
        return int(declared[:20])
    return CHUNK_BYTES if "transfer-encoding" in headers else 0


@dataclass(slots=True)
class Bodies:
    """ASGI middleware: at most MAX_BODIES request bodies of one sender of blobs at a time; the next one gets 429.

    Senders are told apart by their token. One that nobody was given is not counted: it is refused before its body
    is read.
    """

    app: ASGIApp
    known: Callable[[str], bool]  # is this the token of a session?
    _under_way: dict[str, int] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = _token(scope) if scope["type"] == "http" and scope["method"] == "PUT" else ""
        if not token or not self.known(token):
            await self.app(scope, receive, send)
            return
        if self._under_way.get(token, 0) >= MAX_BODIES:
            await _too_many(send)
            return
        self._under_way[token] = self._under_way.get(token, 0) + 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._under_way[token] -= 1
            if not self._under_way[token]:
                del self._under_way[token]


def bearer_token(authorization: str) -> str:
    """The token of an Authorization header; empty if there is none."""
    scheme, _, token = authorization.partition(" ")
    return token if scheme.lower() == "bearer" else ""


def _token(scope: Scope) -> str:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    return bearer_token(next((v.decode("latin-1") for k, v in headers if k == b"authorization"), ""))


async def _too_many(send: Send) -> None:
    message = f"{MAX_BODIES} bodies of this session are under way already: finish one of them first"
    body = json.dumps({"error": {"code": "too_many", "message": message}}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 429, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ------------------------------------------------------------------------------------------- connections
class PromptHttp(HttpToolsProtocol):
    """uvicorn's HTTP, but a connection has HEADERS_TIMEOUT_S to begin its first request, and a request as long, and
    MAX_HEADERS_BYTES, to finish its headers. (Between two requests uvicorn's keep-alive timeout applies.)"""

    _late: asyncio.TimerHandle | None = None  # while headers are expected
    _unfinished_bytes = 0  # of those headers

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(END_GRACE_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        self._unfinished_bytes += len(data)
        super().data_received(data)
        if self._late is not None and self._unfinished_bytes > MAX_HEADERS_BYTES:
            self._end()

    def on_message_begin(self) -> None:
        self._expect_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._have_headers()
        super().on_headers_complete()

    def _expect_headers(self) -> None:
        self._have_headers()
        self._late = self.loop.call_later(HEADERS_TIMEOUT_S, self._end)

    def _have_headers(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        self._unfinished_bytes = 0

    def _end(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class PromptWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, but its end does not wait for a peer that reads no more."""

    def shutdown(self) -> None:
        super().shutdown()
        self.loop.call_later(END_GRACE_S, self.transport.abort)
