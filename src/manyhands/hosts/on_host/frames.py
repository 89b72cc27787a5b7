"""What goes over the connection: lines of JSON, each followed by `size` bytes where it says so.

Every request has one answer, or several of which all but the last say `more`.
"""

from __future__ import annotations

import json
import os
from typing import IO, Any

MARK = b"\0manyhands 1\n"
"""Comes before the first answer: what a login shell prints before it is no answer."""


class Line:
    """Both ways of the connection, as the host sees them."""

    def __init__(self, incoming: IO[bytes], outgoing: IO[bytes]) -> None:
        self.incoming, self.outgoing = incoming, outgoing

    def request(self) -> dict[str, Any] | None:
        line = self.incoming.readline()
        while line == b"\n":  # from a follower, to say that it is there
            line = self.incoming.readline()
        return json.loads(line.decode("utf-8")) if line else None

    def body(self, size: int) -> bytes:
        body = self.incoming.read(size)
        if len(body) < size:
            raise EOFError
        return body

    def answer(self, body: bytes = b"", **fields: Any) -> None:
        """One that says `more` may wait in the buffer for what follows it, until `flush`."""
        if body:
            fields["size"] = len(body)
        self.outgoing.write(json.dumps(fields).encode("utf-8") + b"\n")
        if body:
            self.outgoing.write(body)
        if not fields.get("more"):
            self.outgoing.flush()

    def flush(self) -> None:
        self.outgoing.flush()


def absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
