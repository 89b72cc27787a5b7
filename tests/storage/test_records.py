"""What is stored reads back as the same value, bit for bit."""

from __future__ import annotations

import math
import struct
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.coordination.effects import Body, Work
from manyhands.coordination.events import Evaluated, Event, PauseAsked
from manyhands.coordination.records import dump_body, dump_event, dump_state
from manyhands.coordination.state import Client, DataLedger, Entry, Round, RunState
from manyhands.coordination.types import Assignment, Held, IndexRange, OuterTerms, RoundTerms
from manyhands.errors import StorageError
from manyhands.plan.schema import Plan
from manyhands.storage.records import read_body, read_event, read_state

floats = st.floats(allow_nan=True, allow_infinity=True, allow_subnormal=True)
rounds = st.integers(0, 2**31)
ranges = st.builds(IndexRange, epoch=rounds, start=st.integers(0, 2**62), stop=st.integers(0, 2**62))
assignments = st.builds(
    Assignment,
    id=st.text(max_size=9),
    round=rounds,
    client=st.text(max_size=9),
    steps=rounds,
    batch_size=rounds,
    ranges=st.lists(ranges, max_size=3).map(tuple),
    weight=st.integers(0, 2**60),
    seed=st.integers(0, 2**63 - 1),
)
terms = st.builds(
    RoundTerms,
    round=rounds,
    fragment=rounds,
    first_step=rounds,
    learning_rates=st.lists(floats, max_size=4).map(tuple),
    outer=st.builds(OuterTerms, lr=floats, bias1=floats, bias2=floats),
    deadline_ms=st.integers(0, 2**62),
)


def bits(value: float) -> bytes:
    return struct.pack("<d", math.nan if math.isnan(value) else value)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(loss=floats, metric=floats, reason=st.text())
def test_events_come_back(loss: float, metric: float, reason: str) -> None:
    back = read_event(dump_event(Evaluated(round=1, loss=loss, samples=2, metrics={reason: metric})))
    assert isinstance(back, Evaluated)
    assert (bits(back.loss), bits(back.metrics[reason])) == (bits(loss), bits(metric))
    assert read_event(dump_event(PauseAsked(reason=reason))) == PauseAsked(reason=reason)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(assignment=assignments, terms=terms)
def test_effects_come_back(assignment: Assignment, terms: RoundTerms) -> None:
    body = Work(assignment=assignment, terms=terms)
    assert repr(read_body(dump_body(body))) == repr(body)  # repr: NaN equals itself


@settings(max_examples=30, deadline=None, derandomize=True)
@given(assignment=assignments, terms=terms, evaluations=st.dictionaries(rounds, floats, max_size=3))
def test_states_come_back(assignment: Assignment, terms: RoundTerms, evaluations: dict[int, float]) -> None:
    entry = Entry(assignment=assignment, status="agreed", assigned_ms=4, witnesses=frozenset({"server"}))
    state = RunState(
        run_id="run-1",
        plan=Plan(),
        phase="training",
        sequence=17,
        clients={"k": Client(key="k", boot="b", label="ü", status="ready", round=None)},
        rounds={3: Round(number=3, stage="agree", terms=terms, opened_ms=9, entries={assignment.id: entry})},
        data=DataLedger(total=9, assigned={assignment.id: assignment.ranges}),
        snapshots=(),
        reported={2: {"k": Held("00ff", "ff00")}},
        snapshot_asked=(3, "k", 5),
        evaluations=evaluations,
    )
    back = read_state(dump_state(state))
    assert repr(back) == repr(state)
    assert list(back.evaluations) == list(state.evaluations)


def test_every_word_of_coordination_is_stored_by_its_kind() -> None:
    for union in (Event, Body):
        members = get_args(get_args(union)[0])
        kinds = [member.__dataclass_fields__["kind"].default for member in members]
        assert len(set(kinds)) == len(members)


@pytest.mark.parametrize("text", ["null", "{}", '{"kind":"left"}', '{"kind":"unheard_of"}', "[1", "3"])
def test_what_is_damaged_is_refused(text: str) -> None:
    for read in (read_event, read_body, read_state):
        with pytest.raises(StorageError, match="cannot be read"):
            read(text)
