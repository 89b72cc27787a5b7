from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from manyhands.coordination.events import (
    Advanced,
    Checkpointed,
    ClockPassed,
    Committed,
    Contributed,
    Evaluated,
    Event,
    Fingerprinted,
    Joined,
    Left,
    Ready,
    Recovered,
    ResumeAsked,
    ServerStarted,
    SnapshotStored,
    Suspected,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.machine import initial_state, next_deadline, tick
from manyhands.coordination.types import AGGREGATOR, BlobRef, Contribution, Snapshot

MakeDesk = Callable[..., Any]
BLOB = BlobRef(blob="b", size_bytes=1)


def test_a_run_needs_samples(plan: Any) -> None:
    with pytest.raises(ValueError, match="samples is 0"):
        initial_state("r", plan(), 0, Snapshot(round=0, blob=BLOB, fingerprint="f"))


def test_effects_are_numbered_by_the_event_that_caused_them(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 2})
    events: list[Event] = [Joined(client="a", boot="1"), Joined(client="b", boot="1")]
    events += [Ready(client="a", round=0), Ready(client="b", round=0)]
    done = tick(table.state, events, 5, 0)
    assert done.state.sequence == 4
    ids = [(numbered.sequence, numbered.n) for numbered in done.effects]
    assert ids == sorted(set(ids))
    by_event = {sequence: [n for s, n in ids if s == sequence] for sequence, _ in ids}
    assert all(positions == list(range(len(positions))) for positions in by_event.values())
    assert set(by_event) == {1, 2, 4}


def test_many_events_in_one_tick_are_as_one_by_one(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 2})
    events: list[Event] = [Joined(client=k, boot="1") for k in "abc"] + [
        Ready(client=k, round=0) for k in "abc"
    ]
    together = tick(table.state, events, 5, 0)
    state, effects = table.state, []
    for event in events:
        one = tick(state, (event,), 5, 0)
        state = one.state
        effects += one.effects
    assert (together.state, list(together.effects)) == (state, effects)


def test_time_does_not_go_back(desk: MakeDesk) -> None:
    table = desk(1)
    table.now_ms = 10
    table.do(ClockPassed())
    assert table.state.now_ms == 1000


def test_the_state_that_was_given_is_not_touched(desk: MakeDesk) -> None:
    table = desk(2)
    before = table.state
    copy = dataclasses.replace(before)
    table.send("a", "b")
    assert before == copy
    assert before.rounds[0].entries["0-0"].status == "assigned"


def test_next_deadline(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 1}, rounds={"warmup_s": 50.0})
    assert next_deadline(table.state) is None
    table.join("a", "b")
    assert next_deadline(table.state) == 51_000
    table.ready("a", "b")
    assert next_deadline(table.state) == 101_000
    table.send("a", "b")
    table.accept("a", "b")
    assert next_deadline(table.state) is None, "the aggregator has the word"


MALFORMED: list[Event] = [
    ServerStarted(downtime_ms=-5),
    Joined(client="", boot=""),
    Joined(client="x", boot="1", has_round=-3),
    Ready(client="x", round=-1),
    Ready(client="x", round=10**9),
    Suspected(client="nobody"),
    Recovered(client="nobody"),
    Left(client="nobody", how="lost"),
    Committed(client="nobody", round=-1, assignment="", commit=""),
    Committed(client="a", round=0, assignment="99-99", commit=""),
    Contributed(contribution=Contribution(assignment="0-0", round=0, client="a", commit="")),
    Contributed(contribution=Contribution(assignment="0-0", round=5, client="a", commit="")),
    WorkFailed(client="a", assignment="nothing", reason=""),
    Verdict(by="x", round=0, assignment="0-0", accepted=True),
    Verdict(by=AGGREGATOR, round=3, assignment="0-0", accepted=True),
    Advanced(round=-1, change=BLOB, fingerprint=""),
    Fingerprinted(client="a", round=10**9, fingerprint=""),
    Fingerprinted(client="nobody", round=0, fingerprint=""),
    SnapshotStored(by="a", snapshot=Snapshot(round=-1, blob=BLOB, fingerprint="")),
    SnapshotStored(by=AGGREGATOR, snapshot=Snapshot(round=7, blob=BLOB, fingerprint="")),
    Evaluated(round=-1, loss=float("nan"), samples=-1),
    Checkpointed(round=-1, path=""),
    ResumeAsked(),
]


@pytest.mark.parametrize("topology", ["star", "mesh"])
@pytest.mark.parametrize("event", MALFORMED, ids=lambda event: type(event).__name__)
def test_no_event_raises(desk: MakeDesk, topology: str, event: Event) -> None:
    empty = desk(0, topology=topology)
    empty.do(event, event)
    busy = desk(2, topology=topology)
    busy.do(event, event)
    busy.send("a")
    busy.do(event)
