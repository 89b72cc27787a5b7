"""The agent on the host, from here: requests with their answers, in order, over one channel.

Its text goes with the channel, so it is always of this version and leaves nothing on the host. Nothing but a Python
is needed there: that of the environment which `hosts setup` has made, else the one in the hosts' file, else python3.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import shlex
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from importlib.resources import files
from typing import IO, Any, Final

from manyhands.errors import ManyhandsError, ProtocolError, ServerUnreachable, StorageError, WorkerError
from manyhands.hosts.connection import Channel, Connection, connected
from manyhands.hosts.docker import without_terminal
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.on_host.files import CHUNK
from manyhands.hosts.on_host.frames import MARK

AGENT: Final = ("processes", "frames", "facts", "files", "trainings", "serve")
SUPERVISOR: Final = ("processes", "supervisor")
BEGIN_S: Final = 20.0
SILENCE_S: Final = 60.0
"""So long without a byte, and an answer is given up: something there hangs, a disk or a mount."""
_SILENCE_S: Final[dict[str, float | None]] = {
    **{"partial": 900.0, "hashes": 900.0, "listing": 300.0},  # these read as much as there is
    "put": 600.0,  # on its way over a slow line, or onto a slow disk
    "run": None,  # until it ends
}
_AHEAD_BYTES: Final = 32 << 20
"""Answers that wait for their reader; then the host waits."""
_UNDER_WAY: Final = 4
"""Chunks that were sent and are not answered yet."""
_LINE_BYTES: Final = 256 << 20
"""The longest line of a frame: the listing of a great many files."""
_NO_PYTHON: Final = 127
_BOOT: Final = (
    "import sys;sys.path[:1]=[];f=open(0,'rb');t=f.read(int(f.readline()));g={'__name__':'on_host'};"
    "exec(compile(t,'on_host','exec'),g);g['serve'](f)"
)


def program(modules: tuple[str, ...]) -> str:
    """The modules of on_host/ as one text, without the imports among them."""
    parts = ["from __future__ import annotations\n"]
    for name in modules:
        text = files("manyhands.hosts.on_host").joinpath(f"{name}.py").read_text(encoding="utf-8")
        text = text.replace("from __future__ import annotations\n", "")
        parts.append(re.sub(r"^from manyhands\.hosts\.on_host\.\w+ import [^\n(]+\n", "", text, flags=re.M))
    return "\n\n".join(parts)


def environment_of(host: Host) -> str:
    """The directory of the environment that `hosts setup` makes, as the host sees it."""
    return f"{host.work_dir.rstrip('/')}/venv"


def command_for(host: Host, *, docker: bool = False, python: str | None = None) -> str:
    """A command line for the login shell of the host that starts an agent there, or in its container."""
    candidates = [python] if python else [f"{environment_of(host)}/bin/python", "python3", "python"]
    words = " ".join(_in_shell(name) for name in candidates)
    script = (
        f'for p in {words}; do if command -v "$p" >/dev/null 2>&1; then exec "$p" -c {shlex.quote(_BOOT)}; fi; done; '
        f"exit {_NO_PYTHON}"
    )
    words_before = (
        without_terminal(host.docker_launch_command) if docker and host.docker_launch_command else []
    )
    return shlex.join([*words_before, "sh", "-c", script])


def _in_shell(path: str) -> str:
    """Quoted, but for a leading `~`, which stands for the home directory there."""
    if path == "~" or path.startswith("~/"):
        return '"$HOME"' + (shlex.quote(path[1:]) if path[1:] else "")
    return shlex.quote(path)


@dataclass(slots=True)
class Answer:
    """One frame of the host."""

    fields: dict[str, Any]
    body: bytearray


Pieces = Callable[[dict[str, Any], memoryview], None]


class Agent:
    """Requests to one agent. One at a time is being answered; more may be waiting.

    What it answers is not trusted: frames that are none end the connection with ProtocolError.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._answers: asyncio.Queue[Answer | None] = asyncio.Queue()
        self._frames = _Frames(self._arrived)
        self._channel: Channel | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._begun = asyncio.Event()
        self._complaints = b""
        self._ended: str | None = None
        self._fault: ManyhandsError | None = None
        self._exit_code: int | None = None
        self._waiting_bytes = 0
        self._heard = 0.0
        self._turn = asyncio.Lock()

    # ------------------------------------------------------------------ connection.Receiver
    def received(self, data: bytes) -> None:
        if self._fault is not None:
            return
        self._heard = time.monotonic()
        try:
            self._frames.feed(data)
        except ManyhandsError as error:
            self._fault = type(error)(f"{self._host.host_name}: {error}")
            self.closed(str(error))
            self.close()
        if self._frames.marked:
            self._begun.set()

    def complained(self, data: bytes) -> None:
        self._complaints = (self._complaints + data)[-4000:]

    def may_write(self, may: bool) -> None:
        (self._writable.set if may else self._writable.clear)()

    def exited(self, code: int) -> None:
        self._exit_code = code

    def closed(self, reason: str | None) -> None:
        self._ended = reason or "the agent on the host has ended"
        self._begun.set()
        self._writable.set()
        self._answers.put_nowait(None)

    def _arrived(self, answer: Answer) -> None:
        self._answers.put_nowait(answer)
        self._waiting_bytes += len(answer.body)
        if self._waiting_bytes > _AHEAD_BYTES and self._channel is not None:
            self._channel.read_on(False)

    # ------------------------------------------------------------------ requests
    async def begin(self, connection: Connection, command: str) -> None:
        """Start it. Raises WorkerError where there is no Python, or the container cannot be entered."""
        self._channel = await connection.open(command, self)
        text = program(AGENT).encode()
        self._channel.write(f"{len(text)}\n".encode() + text)
        try:
            async with asyncio.timeout(BEGIN_S):
                await self._begun.wait()
        except TimeoutError:
            self._ended = f"it did not answer within {BEGIN_S:.0f} s"
        if self._frames.marked:
            return
        await asyncio.sleep(0.05)  # what it says in the end may still be on its way
        said = (self._complaints + b"\n" + self._frames.before).decode("utf-8", "replace").strip()
        if said:
            raise WorkerError(f"{self._host.host_name}: nothing can be run there:\n{said[-1500:]}")
        if self._exit_code != _NO_PYTHON:
            raise ServerUnreachable(f"{self._host.host_name}: the connection was lost ({self._ended})")
        python = self._host.python or f"{environment_of(self._host)}/bin/python or python3"
        raise WorkerError(
            f"{self._host.host_name} has no Python at {python}: install Python 3.11 or later there, or name one in "
            '"Python" of the hosts\' file'
        )

    async def ask(self, op: str, body: bytes = b"", **fields: Any) -> dict[str, Any]:
        """One request with one answer. Raises StorageError for a fault of the host's disk, ServerUnreachable."""
        async with self._turn:
            silence_s = _SILENCE_S.get(op, SILENCE_S)
            await self._send(op, body, fields, silence_s)
            return (await self._next(op, silence_s)).fields

    async def stream(
        self, op: str, *, silence_s: float, pieces: Pieces | None = None, **fields: Any
    ) -> AsyncIterator[Answer]:
        """One request with many answers; the last one, which does not say `more`, comes as well.

        silence_s: so long without a byte, and it is given up with ServerUnreachable.

        pieces: gets the bodies as they arrive, before their answer, which then has none. A ManyhandsError of it ends
        the connection and is raised here.
        """
        async with self._turn:
            self._frames.pieces = pieces
            try:
                await self._send(op, b"", fields, silence_s)
                while True:
                    answer = await self._next(op, silence_s)
                    yield answer
                    if not answer.fields.get("more"):
                        return
            finally:
                self._frames.pieces = None

    async def put_all(self, file: IO[bytes], path: str, first: int, size: int) -> None:
        """The rest of a file, from where it stands, in chunks of which several are under way."""
        async with self._turn:
            offset, unanswered = first, 0
            while True:
                body = file.read(CHUNK)
                last = offset + len(body) >= size
                await self._send(
                    "put", body, {"path": path, "offset": offset, "last": last}, _SILENCE_S["put"]
                )
                offset, unanswered = offset + len(body), unanswered + 1
                while unanswered > (0 if last else _UNDER_WAY):
                    await self._next("put", _SILENCE_S["put"])
                    unanswered -= 1
                if last:
                    return

    def still_here(self) -> None:
        """Tell a following agent that somebody reads."""
        if self._channel is not None and self._ended is None:
            self._channel.write(b"\n")

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    async def _send(self, op: str, body: bytes, fields: dict[str, Any], silence_s: float | None) -> None:
        assert self._channel is not None
        request = {"op": op, **fields}
        if body or op == "put":
            request |= {"size": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        try:
            async with asyncio.timeout(silence_s):
                await self._writable.wait()
        except TimeoutError:
            raise self._given_up(op, silence_s) from None
        if self._ended is None:
            self._channel.write(json.dumps(request).encode() + b"\n" + body)

    async def _next(self, op: str, silence_s: float | None) -> Answer:
        """Waits as long as bytes come. A silence ends the connection: a late answer would be taken for another."""
        answer = (
            None if self._ended is not None and self._answers.empty() else await self._within(op, silence_s)
        )
        if self._fault is not None and answer is None:
            raise self._fault
        if answer is None:
            complaints = self._complaints.decode("utf-8", "replace").strip()
            raise ServerUnreachable(
                f"{self._host.host_name}: the connection was lost ({self._ended})"
                + (f": {complaints[-500:]}" if complaints else "")
            )
        if self._waiting_bytes > _AHEAD_BYTES >= self._waiting_bytes - len(answer.body) and self._channel:
            self._channel.read_on(True)
        self._waiting_bytes -= len(answer.body)
        if "error" in answer.fields:
            raise _fault(self._host, op, answer.fields)
        return answer

    async def _within(self, op: str, silence_s: float | None) -> Answer | None:
        asked = time.monotonic()
        while True:
            left = None if silence_s is None else max(asked, self._heard) + silence_s - time.monotonic()
            try:
                async with asyncio.timeout(left):
                    return await self._answers.get()
            except TimeoutError:
                if silence_s is None or time.monotonic() - max(asked, self._heard) >= silence_s:
                    raise self._given_up(op, silence_s) from None

    def _given_up(self, op: str, silence_s: float | None) -> ServerUnreachable:
        self.closed(f"it had said nothing for {silence_s or 0:.0f} s")
        self.close()
        return ServerUnreachable(f"{self._host.host_name} has said nothing for {silence_s or 0:.0f} s ({op})")


def _fault(host: Host, op: str, fields: dict[str, Any]) -> ManyhandsError:
    text = f"{host.host_name}: {fields['error']}"
    return StorageError(text) if fields.get("kind") == "os" else WorkerError(f"{text} ({op})")


@dataclass(slots=True)
class _Frames:
    """Bytes as they come, into frames. What comes before the mark is a login shell's."""

    arrived: Callable[[Answer], None]
    marked: bool = False
    before: bytes = b""
    pieces: Pieces | None = None
    _buffer: bytearray = field(default_factory=bytearray)
    _answer: Answer | None = None
    _left: int = 0

    def feed(self, data: bytes) -> None:
        if not self.marked:
            self.before += data
            start = self.before.find(MARK)
            if start < 0:
                self.before = self.before[-4000:]
                return
            data = self.before[start + len(MARK) :]
            self.before, self.marked = self.before[:start], True
        view = memoryview(data)
        while len(view):
            view = self._head(view) if self._answer is None else self._body(view)

    def _head(self, view: memoryview) -> memoryview:
        data = bytes(view)
        end = data.find(b"\n")
        if end < 0:
            self._buffer += data
            if len(self._buffer) > _LINE_BYTES:
                raise ProtocolError(
                    f"the host answered a line of more than {_LINE_BYTES >> 20} MiB, which is no frame"
                )
            return view[len(view) :]
        line = bytes(self._buffer) + data[:end]
        self._buffer.clear()
        fields, self._left = _fields(line)
        answer = Answer(fields, bytearray())
        if self._left:
            self._answer = answer
        else:
            self.arrived(answer)
        return view[end + 1 :]

    def _body(self, view: memoryview) -> memoryview:
        answer = self._answer
        assert answer is not None
        part = view[: self._left]
        self._left -= len(part)
        if self.pieces is not None:
            self.pieces(answer.fields, part)
        else:
            answer.body += part
        if not self._left:
            self._answer = None
            self.arrived(answer)
        return view[len(part) :]


def _fields(line: bytes) -> tuple[dict[str, Any], int]:
    """Of a frame, and the size of its body. Raises ProtocolError."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    size = fields.get("size", 0) if isinstance(fields, dict) else None
    if type(size) is not int or not 0 <= size <= CHUNK:
        raise ProtocolError(f"the host answered {line[:200]!r}, which is no frame")
    return fields, size


@contextlib.asynccontextmanager
async def agent(
    connection: Connection, host: Host, *, docker: bool = False, python: str | None = None
) -> AsyncIterator[Agent]:
    """An agent on the host while the block lasts; in its container with `docker`."""
    found = Agent(host)
    try:
        await found.begin(connection, command_for(host, docker=docker, python=python or host.python))
        yield found
    finally:
        found.close()


@contextlib.asynccontextmanager
async def reached(host: Host, *, docker: bool = False) -> AsyncIterator[Agent]:
    """An agent on a host."""
    async with connected(host) as connection, agent(connection, host, docker=docker) as there:
        yield there
