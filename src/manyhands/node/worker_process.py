"""A node's handle on a worker process: start it, call its operations, notice its death.

The node imports no torch; whatever needs it runs in such a process. A worker that dies fails all calls in flight
with WorkerError, once, and stays dead: whoever owns the handle decides whether to start another (inside a run the
node is the only one that restarts).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
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


class WorkerProcess:
    """One worker. Made by `start`; calls may overlap, the worker carries them out in order."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: Path,
        on_notice: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self._log = log
        self._on_notice = on_notice
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._next_call = 0
        self._reading = asyncio.create_task(self._read(), name=f"worker {process.pid}")

    @classmethod
    async def start(
        cls,
        module: str,
        *,
        log: Path,
        on_notice: Callable[[dict[str, Any]], None] | None = None,
    ) -> WorkerProcess:
        """Start `python -m module`. Its output goes to `log`; the first lines of a failure come back in errors."""
        ours, theirs = socket.socketpair()
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                str(theirs.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a Ctrl-C in the terminal is the node's to handle
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_LIMIT_BYTES)
        return cls(process, reader, writer, log, on_notice)

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
        self._writer.close()
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except TimeoutError:
            self._kill()
            await self._process.wait()
        await asyncio.gather(self._reading, return_exceptions=True)

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # dead already, and not yet noticed
                os.killpg(self._process.pid, signal.SIGKILL)

    def _write(self, request: dict[str, Any]) -> None:
        self._writer.write((json.dumps(request) + "\n").encode())

    async def _read(self) -> None:
        try:
            while line := await self._reader.readline():
                self._take(json.loads(line))
        except (ConnectionError, ValueError):
            pass
        finally:
            self._kill()
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
        try:
            tail = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        except OSError:
            tail = []
        last = "\n  ".join(tail)
        return f"the worker process {self._process.pid} {how}; its log is {self._log}" + (
            f", which ends with:\n  {last}" if last else ""
        )
