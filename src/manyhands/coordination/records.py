"""Records of a run's log, and the JSON of events, effects' bodies and states.

The one place that knows how they are written: floats survive exactly, NaN and infinities included (a run that
diverges reports them), and what is written here is read back equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from manyhands.coordination.effects import Body
from manyhands.coordination.events import Event
from manyhands.coordination.machine import NumberedEffect, tick
from manyhands.coordination.state import RunState

_EXACT = ConfigDict(ser_json_inf_nan="constants")
_EVENT: TypeAdapter[Any] = TypeAdapter(Event, config=_EXACT)
_BODY: TypeAdapter[Any] = TypeAdapter(Body, config=_EXACT)
# A dataclass of its own takes no configuration here, a list of one does.
_STATE: TypeAdapter[list[RunState]] = TypeAdapter(list[RunState], config=_EXACT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One event as the shell stores it: all that `tick` needs to do it again."""

    sequence: int
    now_ms: int
    seed: int
    event: Event


def dump_event(event: Event) -> bytes:
    return bytes(_EVENT.dump_json(event))


def load_event(data: bytes | str) -> Event:
    """Raises pydantic.ValidationError."""
    event: Event = _EVENT.validate_json(data)
    return event


def dump_body(body: Body) -> bytes:
    return bytes(_BODY.dump_json(body))


def load_body(data: bytes | str) -> Body:
    """Raises pydantic.ValidationError."""
    body: Body = _BODY.validate_json(data)
    return body


def dump_state(state: RunState) -> bytes:
    """The whole state, for compacting the log."""
    return bytes(_STATE.dump_json([state]))


def load_state(data: bytes | str) -> RunState:
    """Raises pydantic.ValidationError."""
    return _STATE.validate_json(data)[0]


def replay(state: RunState, records: Iterable[Record]) -> tuple[RunState, tuple[NumberedEffect, ...]]:
    """The state and all effects after some records, from the state before the first of them.

    Records up to `state.sequence` are skipped: the state has seen them. Raises ValueError where one is missing.
    """
    effects: list[NumberedEffect] = []
    for record in records:
        if record.sequence <= state.sequence:
            continue
        if record.sequence != state.sequence + 1:
            raise ValueError(
                f"the log goes from event {state.sequence} to {record.sequence}, expected {state.sequence + 1}; "
                "restore the missing events from a backup"
            )
        done = tick(state, (record.event,), record.now_ms, record.seed)
        state = done.state
        effects += done.effects
    return state, tuple(effects)
