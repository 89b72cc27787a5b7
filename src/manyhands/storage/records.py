"""Reading back what the log holds, as coordination/records.py wrote it: what cannot be read is a StorageError."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from manyhands.coordination import records
from manyhands.coordination.effects import Body
from manyhands.coordination.events import Event
from manyhands.coordination.state import RunState
from manyhands.errors import StorageError

T = TypeVar("T")


def read_event(text: str | bytes) -> Event:
    """Raises StorageError."""
    return _read("event", records.load_event, text)


def read_body(text: str | bytes) -> Body:
    """Raises StorageError."""
    return _read("effect", records.load_body, text)


def read_state(text: str | bytes) -> RunState:
    """Raises StorageError."""
    return _read("state", records.load_state, text)


def _read(name: str, load: Callable[[str | bytes], T], text: str | bytes) -> T:
    """What is in the log was written by this program, so what does not fit is damaged or foreign."""
    try:
        return load(text)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise StorageError(
            f"a stored {name} cannot be read ('{where}': {fault['msg']}): other version?"
        ) from None
