"""The agent: answers the requests of one connection, one after the other."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import IO, Any

from manyhands.hosts.on_host.facts import free_port, probe, run
from manyhands.hosts.on_host.files import hashes, listing, partial, put, read, text
from manyhands.hosts.on_host.frames import MARK, Line
from manyhands.hosts.on_host.trainings import follow, leave, start, status, stop

F_SETPIPE_SZ = 1031
PIPE_BYTES = 1 << 20
OPERATIONS: dict[str, Callable[[Line, dict[str, Any]], None]] = {
    operation.__name__: operation
    for operation in (
        *(probe, free_port, run),
        *(put, partial, listing, read, hashes, text),
        *(start, follow, stop, status, leave),
    )
}


def serve(incoming: IO[bytes]) -> None:
    """Until the other side goes."""
    with contextlib.suppress(ImportError, OSError):  # a wider pipe to sshd, where that can be had
        import fcntl

        fcntl.fcntl(1, F_SETPIPE_SZ, PIPE_BYTES)
    line = Line(incoming, sys.stdout.buffer)
    line.outgoing.write(MARK)
    line.outgoing.flush()
    try:
        request = line.request()
        while request is not None:
            try:
                OPERATIONS[request["op"]](line, request)
            except BrokenPipeError:
                raise
            except OSError as error:
                line.answer(error=str(error), errno=error.errno, kind="os")
            request = line.request()
    except (BrokenPipeError, EOFError, KeyboardInterrupt):
        os._exit(1)
