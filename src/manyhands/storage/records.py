"""What the log holds, typed, and its JSON: events, effects and states of coordination, exact in both
directions.

Floats are written with the shortest digits that read back as the same bits. NaN and infinities, which a
diverged loss may be, are written as such: pydantic's default would turn them into null, which could not be
read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from manyhands.coordination.state import RunState
from manyhands.coordination.types import Body, Effect, Event
from manyhands.errors import StorageError

_EXACT = ConfigDict(ser_json_inf_nan="constants")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRecord:
    """One event of a run's log with the arguments of its tick, so that a replay gets the same. Numbered from
    1."""

    sequence: int
    now_ms: int
    seed: int
    event: Event


@dataclass(frozen=True, slots=True, kw_only=True)
class EffectRecord:
    """One effect; (sequence of its event, position n among that event's effects) is its id."""

    sequence: int
    n: int
    effect: Effect

    @property
    def id(self) -> tuple[int, int]:
        return (self.sequence, self.n)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    # A dataclass by itself would not take the configuration; as a member of a union it does.
    kinds: dict[str, Any] = {"event": Event, "effect": Body, "state": RunState | None}
    return TypeAdapter(kinds[name], config=_EXACT)


def event_to_json(event: Event) -> bytes:
    return _adapter("event").dump_json(event)


def event_from_json(body: str | bytes) -> Event:
    event: Event = _parsed("event", body)
    return event


def body_to_json(body: Body) -> bytes:
    return _adapter("effect").dump_json(body)


def body_from_json(text: str | bytes) -> Body:
    body: Body = _parsed("effect", text)
    return body


def state_to_json(state: RunState) -> bytes:
    return _adapter("state").dump_json(state)


def state_from_json(body: str | bytes) -> RunState:
    state: RunState = _parsed("state", body)
    return state


def _parsed(name: str, body: str | bytes) -> Any:
    """Raises StorageError: what is in the log was written by this program, so it is damaged or foreign."""
    try:
        value = _adapter(name).validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise StorageError(
            f"a stored {name} cannot be read ('{where}': {fault['msg']}): other version?"
        ) from None
    if value is None:
        raise StorageError(f"a stored {name} cannot be read: it is null")
    return value
