from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from manyhands.coordination.events import Evaluated
from manyhands.coordination.records import (
    dump_body,
    dump_event,
    dump_state,
    load_body,
    load_event,
    load_state,
    replay,
)

MakeDesk = Callable[..., Any]


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_what_is_written_is_read_back_equal(desk: MakeDesk, topology: str) -> None:
    table = desk(3, topology=topology, samples=20, schedule={"kind": "cosine"}, outer={"name": "adamw"})
    table.send("a", "b", loss=1.0 / 3.0)
    table.do(Evaluated(round=0, loss=float("nan"), samples=1))
    assert load_state(dump_state(table.state)) == table.state
    for record in table.records:
        if not isinstance(record.event, Evaluated):
            assert load_event(dump_event(record.event)) == record.event
    for effect in table.all_effects:
        assert load_body(dump_body(effect.body)) == effect.body


def test_numbers_that_are_none_survive() -> None:
    event = load_event(dump_event(Evaluated(round=0, loss=float("nan"), samples=1)))
    assert isinstance(event, Evaluated)
    assert event.loss != event.loss
    assert load_event(dump_event(Evaluated(round=0, loss=float("inf"), samples=1))) == Evaluated(
        round=0, loss=float("inf"), samples=1
    )


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValidationError):
        load_event(b'{"kind":"unheard_of"}')


def test_replay_from_the_start_and_from_a_compacted_state(desk: MakeDesk) -> None:
    table = desk(2)
    table.whole_round("a", "b")
    middle = load_state(dump_state(table.state))
    table.whole_round("a", "b")
    state, effects = replay(table.initial, table.records)
    assert state == table.state
    assert [numbered.effect for numbered in effects] == table.all_effects
    assert replay(middle, table.records)[0] == table.state, "records that it has seen are skipped"
    assert replay(middle, table.records)[1] == tuple(e for e in effects if e.sequence > middle.sequence)


def test_a_gap_in_the_log_is_an_error(desk: MakeDesk) -> None:
    table = desk(2)
    with pytest.raises(ValueError, match="from event 0 to 2"):
        replay(table.initial, table.records[1:])
