"""One holder of blobs as a client sees it: its address, its answers, its faults, and how long to be patient.

A fault is either passing (no connection, a cut one, silence, 5xx, "too many") or final (everything that
asking again would not change). Passing ones are tried again, ever more slowly, until nothing has come for
`patience_s`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp

from manyhands.coordination.types import BlobId
from manyhands.errors import BlobError, ManyhandsError, Refused, ServerUnreachable
from manyhands.network.faults import in_words

_ANSWER_BYTES = 64 * 1024  # of an error's text; what is longer is cut
_READ_BYTES = 1024 * 1024  # how much aiohttp reads ahead

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Where blobs are to be had: `url` without the trailing /blobs. `headers` are sent to this holder alone,
    and looked up at each request, so a session token that is renewed meanwhile is used."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def address(self, blob: BlobId, rest: str = "") -> str:
        return f"{self.url.rstrip('/')}/blobs/{blob}{rest}"


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to try. `in_flight`: chunks under way at once, per holder, of 4 MiB of memory each."""

    in_flight: int = 4
    patience_s: float = 30.0
    first_delay_s: float = 0.1
    longest_delay_s: float = 2.0
    connect_timeout_s: float = 10.0
    silence_timeout_s: float = 30.0


class Passing(Exception):
    """A fault that asking again may cure."""


class Gone(BlobError):
    """The holder does not know the blob."""


class Incomplete(BlobError):
    """The server lacks chunks of a blob that was to be completed."""


@asynccontextmanager
async def requested(
    session: aiohttp.ClientSession, method: str, holder: Holder, address: str, effort: Effort, **options: Any
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A request whose answer is good. Raises Passing, or what the fault means: Refused, Gone, Incomplete,
    BlobError.

    Redirects are not followed: the headers are meant for this holder.
    """
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=effort.connect_timeout_s, sock_read=effort.silence_timeout_s
    )
    headers = {"Accept-Encoding": "identity", **holder.headers, **options.pop("headers", {})}
    try:
        async with session.request(
            method,
            address,
            headers=headers,
            timeout=timeout,
            allow_redirects=False,
            read_bufsize=_READ_BYTES,
            **options,
        ) as answer:
            if not 200 <= answer.status < 300:
                await _raise_fault(answer, holder)
            yield answer
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
        raise BlobError(f"'{holder.url}' is not an HTTP address ({error}).") from None
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        raise Passing(f"{holder.url}: {in_words(error)}") from error


async def _raise_fault(answer: aiohttp.ClientResponse, holder: Holder) -> None:
    code, message = "", ""
    try:
        fault = json.loads(await read_limited(answer, _ANSWER_BYTES))["error"]
        code, message = str(fault["code"])[:80], str(fault["message"])[:500]
    except (ValueError, TypeError, KeyError, RecursionError, BlobError):
        pass  # an answer of something that is no server of ours: its status says enough
    text = f"{holder.url} answered {answer.status} {code}: {message or answer.reason}".rstrip()
    if answer.status in (401, 403):
        raise Refused(text)
    if answer.status in (408, 429) or (answer.status >= 500 and answer.status != 507):
        raise Passing(text)
    if answer.status == 404:
        raise Gone(text)
    if answer.status == 409:
        raise Incomplete(text)
    raise BlobError(text)


async def read_limited(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body of at most `limit` bytes. Raises BlobError for a longer one, of which no more is read."""
    buffer = bytearray(limit)
    return bytes(memoryview(buffer)[: await read_into(answer, buffer, limit)])


async def read_into(answer: aiohttp.ClientResponse, buffer: bytearray, limit: int) -> int:
    """The same into the first bytes of `buffer`; returns how many. Raises BlobError.

    A buffer that is used again and again stays mapped and warm; collecting a chunk's pieces instead makes the
    allocator map and clear fresh pages for each.
    """
    total = 0
    async for part in answer.content.iter_any():
        end = total + len(part)
        if end > limit:
            answer.close()  # the rest is not read, and the connection not used again
            raise BlobError(f"{answer.url.host} sent more than the {limit} bytes that were expected.")
        buffer[total:end] = part
        total = end
    return total


class Patience:
    """Counts the time without success, and waits between tries: doubling delays, with jitter so that many
    clients of a server that comes back do not ask at once."""

    def __init__(self, effort: Effort) -> None:
        self._effort = effort
        self.delay_s = effort.first_delay_s
        self._since = time.monotonic()

    def succeeded(self) -> None:
        self.delay_s = self._effort.first_delay_s
        self._since = time.monotonic()

    @property
    def over(self) -> bool:
        return time.monotonic() - self._since >= self._effort.patience_s

    async def wait(self) -> None:
        delay_s = self.delay_s * random.uniform(0.5, 1.0)
        self.delay_s = min(2 * self.delay_s, self._effort.longest_delay_s)
        await asyncio.sleep(delay_s)


async def persist(what: str, effort: Effort, ask: Callable[[], Awaitable[Result]]) -> Result:
    """Ask until there is an answer. Raises ServerUnreachable when patience is over, and every final fault at
    once."""
    patience = Patience(effort)
    while True:
        try:
            return await ask()
        except Passing as fault:
            if patience.over:
                raise unreachable(what, fault, effort) from None
        await patience.wait()


def unreachable(what: str, fault: BaseException, effort: Effort) -> ManyhandsError:
    return ServerUnreachable(
        f"{what}: no success for {effort.patience_s:g} s, last: {fault}. Is the server running and reachable?"
    )
