"""A blob store over HTTP.

    GET  /blobs/{id}/manifest        the manifest, canonical JSON
    GET  /blobs/{id}/chunks/{index}  one chunk; its ETag is its SHA-256
    PUT  /blobs/{id}                 a manifest: begin, or go on with, an upload;
                                     answers {"missing": [index, ...]}
    PUT  /blobs/{id}/chunks/{index}  one chunk, of exactly its length
    POST /blobs/{id}/complete        answers {"blob": id, "size_bytes": n} once the blob is durable

Every fault is answered as {"error": {"code", "message"}}. Nothing larger than one chunk is ever in memory per
request, and at most `max_bodies` chunks at once, whoever sends: later ones wait unread. Hashing and the disk
are in threads.

uvicorn hands a body on in pieces of up to 256 KiB and pauses after each (its high-water mark is 64 KiB). Marks of
1 and 8 MiB were measured and made no difference, so it is left as it is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from manyhands.coordination.types import BlobId
from manyhands.errors import BlobError, StorageError
from manyhands.network.blobs.manifest import CHUNK_BYTES, Manifest, max_manifest_bytes
from manyhands.network.blobs.store import BlobStore, CorruptChunk, IncompleteBlob, UnknownBlob

Action = Literal["read", "write"]
DEFAULT_MAX_BODIES = 64
DEFAULT_BODY_TIMEOUT_S = 30.0
DEFAULT_SLOWEST_BYTES_PER_S = 32 * 1024

_Id = Annotated[str, Path(pattern=r"^[0-9a-f]{64}$")]
_Index = Annotated[int, Path(ge=0, lt=2**31)]
_CLIENT_CLOSED = 499
_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "unknown",
    408: "timeout",
    413: "too_large",
    429: "too_many",
}


class Authorize(Protocol):
    """Who may do what; raises HTTPException to refuse.

    Called for each request before anything of it is read or looked up, with size 0; and for the manifest of
    an upload once more when it has been read, with the blob's size in bytes, before anything is stored.
    """

    def __call__(self, request: Request, action: Action, blob: BlobId, size: int) -> Awaitable[None]: ...


def blob_routes(
    store: BlobStore,
    authorize: Authorize,
    *,
    max_bodies: int = DEFAULT_MAX_BODIES,
    body_timeout_s: float = DEFAULT_BODY_TIMEOUT_S,
    slowest_bytes_per_s: float = DEFAULT_SLOWEST_BYTES_PER_S,
) -> APIRouter:
    """The routes above, for `app.include_router`.

    body_timeout_s: the longest silence within a body. slowest_bytes_per_s: beyond four such silences a body takes no
    longer than its largest size at this rate, or who sends a byte now and then could keep others out for ever.
    """
    patience = _Patience(body_timeout_s, slowest_bytes_per_s)
    router = APIRouter(prefix="/blobs", route_class=_BlobRoute)
    bodies = asyncio.Semaphore(max_bodies)

    @router.get("/{blob}/manifest")
    async def get_manifest(request: Request, blob: _Id) -> Response:
        await authorize(request, "read", blob, 0)
        manifest = await asyncio.to_thread(store.manifest, blob)
        return Response(manifest.to_json(), media_type="application/json")

    @router.get("/{blob}/chunks/{index}")
    async def get_chunk(request: Request, blob: _Id, index: _Index) -> Response:
        await authorize(request, "read", blob, 0)
        manifest = await asyncio.to_thread(store.manifest, blob)
        _check_index(manifest, index)
        headers = {"etag": f'"{manifest.chunks[index].hex()}"', "cache-control": "private, immutable"}
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        data = await asyncio.to_thread(store.read_chunk, blob, index)
        return Response(data, media_type="application/octet-stream", headers=headers)

    @router.put("/{blob}")
    async def begin(request: Request, blob: _Id) -> Response:
        await authorize(request, "write", blob, 0)
        async with bodies:
            parts = await _read_body(request, max_manifest_bytes(store.max_bytes), patience)
        manifest = Manifest.from_json(b"".join(parts), max_bytes=store.max_bytes)
        if manifest.blob != blob:
            raise BlobError(f"this manifest is that of blob {manifest.blob}, not of {blob}.")
        await authorize(request, "write", blob, manifest.size_bytes)
        missing = await asyncio.to_thread(store.begin, manifest)
        return _json(200, {"missing": missing})

    @router.put("/{blob}/chunks/{index}")
    async def put_chunk(request: Request, blob: _Id, index: _Index) -> Response:
        await authorize(request, "write", blob, 0)
        manifest = await asyncio.to_thread(store.wanted, blob)
        _check_index(manifest, index)
        async with bodies:
            parts = await _read_body(request, manifest.length(index), patience)
            await asyncio.to_thread(store.write_chunk, blob, index, *parts)
        return Response(status_code=204)

    @router.post("/{blob}/complete")
    async def complete(request: Request, blob: _Id) -> Response:
        await authorize(request, "write", blob, 0)
        ref = await asyncio.to_thread(store.complete, blob)
        return _json(200, {"blob": ref.blob, "size_bytes": ref.size_bytes})

    return router


# ------------------------------------------------------------------------------------------- bodies
@dataclass(frozen=True, slots=True)
class _Patience:
    """How long to wait for a body: see `blob_routes`."""

    silence_s: float
    slowest_bytes_per_s: float

    def whole_s(self, limit: int) -> float:
        return 4 * self.silence_s + limit / self.slowest_bytes_per_s


async def _read_body(request: Request, limit: int, patience: _Patience) -> list[bytes]:
    """A body of at most `limit` bytes, in the pieces it came in: joining them would be one more copy.

    Raises 413 as soon as it is clear that there are more, 408 after a silence, or when it takes too long.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    parts: list[bytes] = []
    total = 0
    loop = asyncio.get_running_loop()
    end = loop.time() + patience.whole_s(limit)
    try:
        async with asyncio.timeout(patience.silence_s) as silence:
            async for part in request.stream():
                total += len(part)
                if total > limit:
                    raise _too_large(limit)
                parts.append(part)
                silence.reschedule(min(end, loop.time() + patience.silence_s))
    except TimeoutError:
        text = f"nothing came for {patience.silence_s:g} s after {total} bytes of the body."
        if silence.when() == end:
            text = f"the body came too slowly: {total} bytes in {patience.whole_s(limit):.0f} s."
        raise HTTPException(408, text) from None
    return parts


def _too_large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than the {limit} bytes that are expected here.")


async def _discard_rest(request: Request, timeout_s: float) -> bool:
    """Read what a refused client is still sending, a chunk at most; whether that was all.

    Closing at once would reset its connection, and it would never see the answer.
    """
    left = CHUNK_BYTES
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                left -= len(part)
                if left < 0:
                    return False
    except (TimeoutError, ClientDisconnect):
        return False
    except RuntimeError:  # Starlette's word for a body that was read already
        return True
    return True


# ------------------------------------------------------------------------------------------- answers
class _BlobRoute(APIRoute):
    """Turns every fault into the one form of answer that clients understand."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_CLOSED)  # nobody reads it
            except RequestValidationError as error:
                fault = error.errors()[0]
                answer = _error(400, "bad_request", f"'{fault['loc'][-1]}' in the address: {fault['msg']}.")
            except (HTTPException, BlobError, StorageError) as error:
                answer = _fault(error)
            if answer.status_code in (408, 413) or not await _discard_rest(request, DEFAULT_BODY_TIMEOUT_S):
                answer.headers["connection"] = "close"  # what is still coming is not worth reading
            return answer

        return handled


def _fault(error: HTTPException | BlobError | StorageError) -> Response:
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code, "refused")
        return _error(error.status_code, code, str(error.detail), error.headers)
    status, code = 400, "bad_blob"
    if isinstance(error, StorageError):
        status, code = 507, "storage"
    elif isinstance(error, UnknownBlob):
        status, code = 404, "unknown"
    elif isinstance(error, IncompleteBlob):
        status, code = 409, "incomplete"
    elif isinstance(error, CorruptChunk):
        status, code = 422, "corrupt"
    return _error(status, code, str(error))


def _check_index(manifest: Manifest, index: int) -> None:
    if index >= len(manifest.chunks):
        raise HTTPException(
            404, f"blob {manifest.blob} has {len(manifest.chunks)} chunks: there is no {index}."
        )


def _error(status: int, code: str, message: str, headers: Any = None) -> Response:
    return _json(status, {"error": {"code": code, "message": message}}, headers)


def _json(status: int, value: Any, headers: Any = None) -> Response:
    return Response(json.dumps(value), status, headers=headers, media_type="application/json")
