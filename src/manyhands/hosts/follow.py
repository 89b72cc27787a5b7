"""A training on a host, seen from here: every byte of its events and its log, and every change of its state.

One command on the host looks at the files and sends what is new, with a beat each two seconds; so nothing here polls,
and a host that has gone is noticed. After a loss the connection is made again and goes on at the size of the copies.
Bytes are written at their own offsets: two terminals that follow the same run write the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from manyhands.errors import ProtocolError, ServerUnreachable, StorageError
from manyhands.hosts.agent import Agent, Answer, agent
from manyhands.hosts.connection import connected
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.patience import Patience, patiently

EVENTS: Final = "events.jsonl"
LOG: Final = "host.log"
SILENCE_S: Final = 6.0
"""The host says something every two seconds; after so many without a word the connection is taken for lost."""
_HERE_EVERY_S: Final = 10.0
_LAST_LINES: Final = 30


class Copy:
    """A file of the host as it grows. `path` None: nothing is kept here."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.offset = 0
        self._rest = b""
        self._made = False

    def lines_here(self) -> Iterator[str]:
        """Those that came before; what is cut off at the end comes again."""
        if self.path is None or not self.path.is_file():
            return
        data = self.path.read_bytes()
        self.offset = data.rfind(b"\n") + 1
        yield from data[: self.offset].decode("utf-8", "replace").splitlines()

    def take(self, offset: int, body: bytes | bytearray) -> list[str]:
        """Write the bytes that begin at `offset`; the lines that they complete. Raises StorageError."""
        if self.path is not None:
            try:
                if not self._made:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.path.touch()
                    self._made = True
                with self.path.open("r+b") as file:
                    file.seek(offset)
                    file.write(body)
            except OSError as error:
                raise StorageError(
                    f"{self.path}: {error}; free space here: the training goes on there"
                ) from error
        whole, newline, rest = (self._rest + bytes(body)).rpartition(b"\n")
        self.offset, self._rest = offset + len(body), rest
        return whole.decode("utf-8", "replace").splitlines() if newline else []

    def whole_lines_only(self) -> int:
        """Where to go on after a loss: behind the last whole line."""
        self.offset -= len(self._rest)
        self._rest = b""
        return self.offset


class Follower:
    """Follows one host's share of a run. `on_event` gets events, `on_line` lines of the log, as they come."""

    def __init__(
        self,
        host: Host,
        directory: str,
        *,
        docker: bool = False,
        events: Copy | None = None,
        log: Copy | None = None,
        on_event: Callable[[dict[str, Any]], None],
        on_line: Callable[[str], None] = lambda _line: None,
        on_status: Callable[[dict[str, Any]], None] = lambda _status: None,
        tell: Callable[[str], None],
    ) -> None:
        self._host, self._directory, self._docker = host, directory, docker
        self._copies = {} if events is None else {EVENTS: events}
        self._copies[LOG] = log or Copy(None)
        self._on_event, self._on_line, self._on_status = on_event, on_line, on_status
        self._patience = Patience(host.host_name, tell)
        self._last: deque[str] = deque(maxlen=_LAST_LINES)

    def go_on_from_here(self, *, replay: bool) -> None:
        """What is here already is not asked for; `replay`: its events are handed out."""
        if EVENTS in self._copies:
            for line in self._copies[EVENTS].lines_here():
                if replay:
                    self._event(line)
        self._last.extend(self._copies[LOG].lines_here())

    async def until_its_end(self) -> dict[str, Any]:
        """The last status and lines: `ended`; `lost` where the supervisor is no more; `gone` with the disk.

        Raises ServerUnreachable after a long time without the host, StorageError when the disk here is full.
        """
        return await patiently(self._patience, self._once)

    async def _once(self) -> dict[str, Any]:
        offsets = {name: copy.whole_lines_only() for name, copy in self._copies.items()}
        async with (
            connected(self._host) as connection,
            agent(connection, self._host, docker=self._docker) as there,
        ):
            here = asyncio.create_task(_say_that_we_are_here(there))
            try:
                return await self._listen(there, offsets)
            finally:
                here.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await here

    async def _listen(self, there: Agent, offsets: dict[str, int]) -> dict[str, Any]:
        answers = there.stream("follow", run=self._directory, offsets=offsets, silence_s=SILENCE_S)
        async for answer in answers:
            self._patience.answered()
            self._take(answer)
            if not answer.fields.get("more"):
                return {"tail": list(self._last), **self._ending(answer.fields)}
        raise ServerUnreachable(f"{self._host.host_name}: the agent has ended")

    def _ending(self, fields: dict[str, Any]) -> dict[str, Any]:
        status = fields.get("status")
        if not isinstance(status, dict) or not isinstance(status.get("state"), str):
            raise ProtocolError(
                f"{self._host.host_name} does not say how the training ended: {fields!r:.200}"
            )
        return {**status, "free_bytes": fields.get("free")}

    def _take(self, answer: Answer) -> None:
        """Raises ProtocolError for bytes that were not asked for."""
        name = answer.fields.get("file")
        if name is not None:
            copy = self._copies.get(name) if isinstance(name, str) else None
            offset = answer.fields.get("offset")
            if copy is None or offset != copy.offset:
                raise ProtocolError(f"{self._host.host_name} has sent bytes of {name!r} from {offset!r}")
            for line in copy.take(copy.offset, answer.body):
                (self._event if name == EVENTS else self._printed)(line)
        elif answer.fields.get("status") is not None:
            self._on_status(answer.fields["status"])

    def _printed(self, line: str) -> None:
        self._last.append(line)
        self._on_line(line)

    def _event(self, line: str) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # cut short by a full disk there, or a kill; the next one is whole again
        if isinstance(event, dict) and "kind" in event:
            self._on_event(event)


async def _say_that_we_are_here(there: Agent) -> None:
    while True:
        await asyncio.sleep(_HERE_EVERY_S)
        there.still_here()
