"""A node's handle on a worker process: start it, call its operations, notice its death.

The node imports no torch; whatever needs it runs in such a process. A worker that dies fails all calls in flight
with WorkerError, once, and stays dead: whoever owns the handle decides whether to start another (inside a run the
node is the only one that restarts).

One that hangs as a whole (stopped, or stuck in native code that holds the interpreter) is killed, and then it is dead
like any other: a thread of its own answers pings, whatever the work is at (workers/channel.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manyhands import errors
from manyhands.errors import ManyhandsError, WorkerError

LINE_LIMIT_BYTES = 64 * 1024 * 1024
LOG_TAIL_LINES = 12
SILENCE_S = 30.0
"""Generous: swapping, or an import that holds the interpreter, must not look like the end."""
PINGS = 5
"""So many in a row are unanswered in the time of a silence."""
STARTING_TIMES = 20
"""So much longer it may take until a worker listens: the imports of torch from a cold disk come first."""

logger = logging.getLogger(__name__)


class WorkerProcess:
    """One worker. Made by `start`; calls may overlap, the worker carries them out in order."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Path,
        on_notice: Callable[[dict[str, Any]], None] | None,
        silence_s: float | None,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._log = log
        self._on_notice = on_notice
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_call = 0
        self._heard = self._listens = False
        self._hung = ""
        self._reading = asyncio.create_task(self._read(), name=f"worker {process.pid}")
        self._watching: asyncio.Task[None] | None = None
        if silence_s is not None:
            self._watching = asyncio.create_task(self._watch(silence_s), name=f"pings to {process.pid}")

    @classmethod
    async def start(
        cls,
        module: str,
        *,
        log: Path,
        on_notice: Callable[[dict[str, Any]], None] | None = None,
        silence_s: float | None = SILENCE_S,
        title: str = "",
    ) -> WorkerProcess:
        """Start `python -m module`. Its output goes to `log`; the last lines of it come back in errors.

        silence_s: how long it may leave pings unanswered before it is killed; None: as long as it likes. title: a
        last word on its command line, to tell it from others like it.
        """
        ours, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(theirs.fileno()),
                *([title] if title else []),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is the node's to handle
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_LIMIT_BYTES)
        return cls(process, reader, writer, log, on_notice, silence_s)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and not self._reading.done()

    async def call(self, operation: str, **arguments: Any) -> Any:
        """The operation's result. Raises the ManyhandsError that it raised, or WorkerError if the worker died."""
        if not self.alive:
            raise WorkerError(self.last_words())
        self._next_call += 1
        number = self._next_call
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        self._write({"op": operation, "id": number, "arguments": arguments})
        return await future

    def abandon(self, assignment: str) -> None:
        """Ask the worker to give up this work between two micro-batches."""
        if self.alive:
            self._write({"op": "abandon", "id": 0, "arguments": {"assignment": assignment}})

    async def stop(self, grace_s: float = 2.0) -> None:
        """Close the socket, which ends the worker; kill it if it does not go."""
        if self._watching is not None:
            self._watching.cancel()
        self._writer.close()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
            await self._process.wait()
        await asyncio.gather(
            self._reading, *([self._watching] if self._watching else []), return_exceptions=True
        )

    async def ended(self) -> None:
        """Until it is dead."""
        await asyncio.wait([self._reading])

    def kill(self) -> None:
        """At once; nothing if it is dead already."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # dead already, and not yet noticed
                os.killpg(self._process.pid, signal.SIGKILL)

    def _write(self, request: dict[str, Any]) -> None:
        self._writer.write((json.dumps(request) + "\n").encode())

    async def _watch(self, silence_s: float) -> None:
        """Kill the process when it hangs.

        Counted in pings, not by the clock: a node that stood still itself has not asked meanwhile.
        """
        unanswered = 0
        while unanswered < (PINGS if self._listens else PINGS * STARTING_TIMES):
            self._heard = False
            self._write({"op": "ping"})
            await asyncio.sleep(silence_s / PINGS)
            unanswered = 0 if self._heard else unanswered + 1
        waited_s = unanswered * silence_s / PINGS
        self._hung = f" since it had not answered for {waited_s:g} s"
        logger.error("the worker process %d has not answered for %g s: it is killed", self.pid, waited_s)
        self.kill()

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._heard = self._listens = True
                self._take(json.loads(line))
        except (ConnectionError, ValueError):
            pass
        finally:
            if self._watching is not None:
                self._watching.cancel()
            self.kill()
            await self._process.wait()
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(WorkerError(self.last_words()))
            self._calls.clear()

    def _take(self, message: dict[str, Any]) -> None:
        if "notice" in message:
            if self._on_notice is not None:
                self._on_notice(message["notice"])
            return
        future = self._calls.pop(message["id"], None)
        if future is None or future.done():
            return
        if "error" in message:
            kind = getattr(errors, message["type"], WorkerError)
            known = isinstance(kind, type) and issubclass(kind, ManyhandsError)
            future.set_exception((kind if known else WorkerError)(message["error"]))
        else:
            future.set_result(message["result"])

    def last_words(self) -> str:
        """How it died, and the end of its log."""
        code = self._process.returncode
        how = (
            f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
        )
        how += self._hung
        try:
            tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            tail = []
        last = "\n  ".join(tail)
        return f"the worker process {self._process.pid} {how}; its log is {self._log}" + (
            f", which ends with:\n  {last}" if last else ""
        )
