"""A client's connection to its server: sign-in, deliveries in, intents out, for as long as the client wants it.

The connection comes back by itself: after a cut it signs in again as the same boot, goes on after the last delivery
handled, and repeats the intents that were not acknowledged. It gives up only when the server refuses for good.
Whoever uses it sees one stream of deliveries and an `ask` that returns when the server has made an intent durable.
A client that starts over is another boot: what the old one had asked for or was told is not the new one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import aiohttp

from manyhands.errors import ProtocolError, Refused, ServerUnreachable
from manyhands.identity.contributions import new_nonce
from manyhands.identity.keys import Identity
from manyhands.network import messages
from manyhands.network.blobs.holders import Holder
from manyhands.network.faults import in_words
from manyhands.network.messages import (
    PROTOCOL_VERSIONS,
    Ack,
    Challenge,
    Deliver,
    Goodbye,
    Heartbeat,
    Hello,
    Intent,
    IntentBody,
    Progress,
    Rejected,
    Welcome,
)
from manyhands.network.sign_in import answer

CONNECT_TIMEOUT_S = 10.0
FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 5.0
SILENCE_S = 30.0
"""A server that says nothing for so long, not even a pong, is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Who connects, to what. `check_server` is given the server's key and raises Refused if it is the wrong one."""

    address: str  # host:port
    run_id: str
    identity: Identity
    label: str
    check_server: Callable[[str], None]


@dataclass(eq=False, slots=True)
class Connection:
    """One task iterates over `deliveries()` and does nothing slow there; others `ask` meanwhile.

    A delivery counts as seen once it was yielded: the same boot is the same process, whose memory holds it.
    """

    terms: Terms
    on_state: Callable[[str, str], None]  # ("connected" | "disconnected" | "waiting", text for people)
    boot: str = field(default_factory=lambda: secrets.token_hex(16))
    progress: Callable[[], Progress] = Progress  # asked at each heartbeat
    welcome: Welcome | None = None
    patient: bool = False  # True: wait for a server that is not there yet
    plan_hash: str | None = None
    has_round: int | None = None
    finished: str = ""  # what the server said of a run that was finished before we came
    _headers: dict[str, str] = field(default_factory=dict)
    _seen: tuple[int, int] | None = None
    _socket: aiohttp.ClientWebSocketResponse | None = None
    _http: aiohttp.ClientSession | None = None
    _waiting: dict[str, tuple[Intent, asyncio.Future[None]]] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)
    _connected: asyncio.Event = field(default_factory=asyncio.Event)
    server: str = ""  # its key, once it has proved it

    @property
    def http(self) -> aiohttp.ClientSession:
        """For blobs; made at the first connection."""
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=16),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            )
        return self._http

    @property
    def base_url(self) -> str:
        return f"http://{self.terms.address}"

    @property
    def holder(self) -> Holder:
        """The server as a holder of blobs; its headers follow the session."""
        return Holder(url=self.base_url, headers=self._headers)

    async def ask(self, body: IntentBody) -> None:
        """Send an intent; returns when it is durable at the server, over as many connections as it takes.

        Raises Refused when the server refuses it for good, or when this client starts over meanwhile.
        """
        intent = Intent(id=f"{self.boot[:8]}-{next(self._numbers)}", body=body)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[intent.id] = (intent, future)
        await self._say(intent)
        try:
            await future
        finally:
            self._waiting.pop(intent.id, None)

    @property
    def session(self) -> Welcome | None:
        """The live session, another object after each sign-in; None while there is none."""
        return self.welcome if self._connected.is_set() else None

    async def until_connected(self) -> None:
        await self._connected.wait()

    async def start_over(self, has_round: int | None) -> None:
        """Sign in as a new boot that holds public at `has_round` (None: nothing), so that a CatchUp follows.

        From the call on nothing of the old boot is delivered or repeated: its work was given back.
        """
        self.boot = secrets.token_hex(16)
        self.has_round = has_round
        self._seen = None
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(
                    Refused("this client starts over: the session it was asked in has ended")
                )
        self._waiting.clear()
        if self._socket is not None:
            await self._socket.close()

    async def beat(self) -> None:
        """Say how the work goes, out of turn: best effort, and no longer than a moment."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._say(Heartbeat(progress=self.progress()))

    async def close(self) -> None:
        if self._socket is not None:
            await self._socket.close()
        if self._http is not None:
            await self._http.close()

    async def deliveries(self) -> AsyncIterator[Deliver]:
        """All deliveries, over all reconnects; ends when the run is finished already (`finished` says so then).

        Raises Refused, ProtocolError, or ServerUnreachable if the first contact fails.
        """
        wait_s = FIRST_WAIT_S
        while not self.finished:
            boot, state = self.boot, "disconnected"
            try:
                async for delivery in self._one_connection():
                    yield delivery
                why = "the server closed the connection" if boot == self.boot else "signing in anew"
            except _Finished as finished:
                self.finished = str(finished)
                return
            except _Later as later:
                state, why, wait_s = "waiting", str(later), max(wait_s, later.wait_s)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                why = in_words(error)
                if self.welcome is None and not self.patient:
                    raise ServerUnreachable(
                        f"no manyhands server answers at {self.terms.address}: {why}. "
                        "Is it running there (`manyhands server status --server-addr HOST:PORT`)?"
                    ) from None
            if self._connected.is_set():
                wait_s = FIRST_WAIT_S  # it was there: a server that starts again is soon back
                self._connected.clear()
            self._socket = None
            self.on_state(
                state, f"no session with {self.terms.address}: {why}; trying again in {wait_s:.1f} s"
            )
            await asyncio.sleep(wait_s * random.uniform(0.75, 1.25))
            wait_s = min(LONGEST_WAIT_S, wait_s * 1.7)

    async def _one_connection(self) -> AsyncIterator[Deliver]:
        boot, url = self.boot, f"{self.base_url}/connect"
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            socket = await self.http.ws_connect(
                url, max_msg_size=messages.MAX_DELIVERY_BYTES, heartbeat=SILENCE_S / 2, compress=0
            )
        async with socket:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                welcome = await self._sign_in(socket)
            if boot != self.boot:
                return  # started over during the sign-in
            self.welcome = welcome
            if not welcome.resumed:
                self._seen = None
            self._socket = socket
            self._connected.set()
            self.on_state("connected", f"connected to {self.terms.address}")
            beating = asyncio.create_task(self._beat(socket, welcome.heartbeat_s))
            try:
                for intent, _ in list(self._waiting.values()):
                    await self._say(intent)
                async for message in socket:
                    if message.type is not aiohttp.WSMsgType.TEXT or boot != self.boot:
                        break
                    delivery = self._take(messages.from_server(message.data))
                    if delivery is not None:
                        yield delivery
            finally:
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)

    def _take(self, message: object) -> Deliver | None:
        match message:
            case Deliver():
                if self._seen is None or message.id > self._seen:
                    self._seen = message.id
                    return message
            case Ack():
                _, future = self._waiting.get(message.id, (None, None))
                if future is not None and not future.done():
                    if message.error is None:
                        future.set_result(None)
                    else:
                        future.set_exception(Refused(message.error))
            case Goodbye(final=True) | Rejected(final=True):
                raise Refused(f"the server ended the session: {message.reason}")
            case Goodbye() | Rejected():
                raise _Later(message.reason)
            case _:
                raise ProtocolError(f"unexpected {type(message).__name__} from the server")
        return None

    async def _sign_in(self, socket: aiohttp.ClientWebSocketResponse) -> Welcome:
        identity = self.terms.identity
        hello = Hello(
            versions=PROTOCOL_VERSIONS,
            run_id=self.terms.run_id,
            client=identity.public,
            nonce=new_nonce(),
            boot=self.boot,
            label=self.terms.label,
            seen=self._seen,
            has_round=self.has_round,
            plan_hash=self.plan_hash,
        )
        await socket.send_str(messages.encode(hello))
        received = await self._next(socket)
        if not isinstance(received, Challenge):
            raise ProtocolError(f"expected 'challenge' from the server, got '{received.type}'")
        self.terms.check_server(received.server)
        await socket.send_str(messages.encode(answer(identity, hello, received)))
        welcome = await self._next(socket)
        if not isinstance(welcome, Welcome):
            raise ProtocolError(f"expected 'welcome' from the server, got '{welcome.type}'")
        self.server = received.server
        self._headers["Authorization"] = f"Bearer {welcome.token}"
        return welcome

    @staticmethod
    async def _next(
        socket: aiohttp.ClientWebSocketResponse,
    ) -> Challenge | Welcome | Deliver | Ack:
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            raise _Later("the server closed the connection during the sign-in", FIRST_WAIT_S)
        parsed = messages.from_server(message.data)
        if isinstance(parsed, Rejected):
            if parsed.finished:
                raise _Finished(parsed.reason)
            if parsed.final:
                raise Refused(parsed.reason)
            raise _Later(parsed.reason, parsed.retry_after_s)
        if isinstance(parsed, Goodbye):
            raise _Later(parsed.reason)
        return parsed

    async def _beat(self, socket: aiohttp.ClientWebSocketResponse, every_s: float) -> None:
        while True:
            await socket.send_str(messages.encode(Heartbeat(progress=self.progress())))
            await asyncio.sleep(every_s)

    async def _say(self, message: Intent | Heartbeat) -> None:
        """Best effort: an intent that is lost here is repeated after the next sign-in."""
        if self._socket is None:
            return
        try:
            await self._socket.send_str(messages.encode(message))
        except (ConnectionError, aiohttp.ClientError, RuntimeError):
            self._socket = None


class _Finished(Exception):
    """The run is finished: there is nothing to connect for."""


class _Later(Exception):
    """The server cannot take this client now."""

    def __init__(self, reason: str, wait_s: float = 0.5) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
