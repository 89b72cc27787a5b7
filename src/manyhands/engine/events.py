"""What a training tells: structured events, appended to a file as JSON lines and handed to whoever wants them.

Every view is fed by them: the live table, tensorboard, wandb, a follower on another machine. No one parses printed
text.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from manyhands.storage.durable import end_with_a_whole_line

EVENTS_VERSION = 1

Event = dict[str, Any]
Sink = Callable[[Event], None]


class Events:
    """`emit(kind, ...)` while the context lasts, from any thread; a figure that is not finite becomes null.

    path None: no file, for a process that does not lead.
    """

    def __init__(self, path: Path | None, sinks: Sequence[Sink] = ()) -> None:
        self._path, self._sinks = path, list(sinks)
        self._lock = threading.RLock()

    def __enter__(self) -> Events:
        if self._path is not None:
            end_with_a_whole_line(self._path)
        self._file = None if self._path is None else self._path.open("a", encoding="utf-8")
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, sink: Sink) -> None:
        """Hand it every event from now on."""
        self._sinks.append(sink)

    def emit(self, kind: str, **fields: Any) -> None:
        event: Event = {
            "version": EVENTS_VERSION,
            "time_ms": time.time_ns() // 1_000_000,
            "kind": kind,
            **{name: _finite(value) for name, value in fields.items()},
        }
        with self._lock:
            if self._file is not None:
                self._file.write(json.dumps(event, allow_nan=False) + "\n")
                self._file.flush()
            for sink in self._sinks:
                sink(event)


def read_events(path: Path) -> list[Event]:
    """Those of a training, which may be writing the next one just now. Raises OSError, ValueError."""
    whole, _, _half = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.splitlines() if line]


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return value
