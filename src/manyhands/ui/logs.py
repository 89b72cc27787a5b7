"""Where the log lines of a program go: to standard error, and to a file if one is named."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from manyhands.errors import ManyhandsError
from manyhands.storage.durable import end_with_a_whole_line

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def log_to_standard_error(level: int = logging.INFO) -> None:
    """The house's own log lines at `level`, those of libraries from WARNING on."""
    logging.basicConfig(level=logging.WARNING, format=_FORMAT)
    logging.getLogger("manyhands").setLevel(level)


class EventFile:
    """Events appended to a file as JSON lines; None keeps nothing. Each line is flushed, so that it can be
    followed."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._file: Any = None

    def __enter__(self) -> Self:
        if self._path is not None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                end_with_a_whole_line(self._path)
                self._file = self._path.open("a", encoding="utf-8")
            except OSError as error:
                raise ManyhandsError(
                    f"the log {self._path} cannot be written ({error.strerror}): choose another --write-log"
                ) from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, event: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json_line(event) + "\n")
            self._file.flush()


def json_line(event: Mapping[str, Any]) -> str:
    """One event as JSON; what is not JSON by nature (paths) as text, numbers that are not finite as null."""
    finite = {k: None if isinstance(v, float) and v - v != 0 else v for k, v in event.items()}
    return json.dumps(finite, ensure_ascii=False, allow_nan=False, default=str)


def clock(ms: int | None = None) -> str:
    """Local time of day, for lines that people read."""
    return time.strftime("%H:%M:%S", time.localtime(None if ms is None else ms / 1000))
