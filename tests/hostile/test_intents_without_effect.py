"""What the door acknowledges without an event would have changed nothing: compared with the coordinator itself."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest

from manyhands.coordination.effects import Advance
from manyhands.coordination.events import (
    Advanced,
    ClockPassed,
    Committed,
    Contributed,
    Event,
    Fingerprinted,
    Joined,
    Left,
    Ready,
    Recovered,
    SnapshotStored,
    Suspected,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.machine import initial_state, next_deadline, tick
from manyhands.coordination.state import RunState
from manyhands.coordination.types import AGGREGATOR, BlobRef, Claims, Contribution, Snapshot
from manyhands.node.server.intents import changes_nothing
from manyhands.plan.schema import Plan

KEYS = tuple(digit * 64 for digit in "abc")
REF = BlobRef(blob="d" * 64, size_bytes=100)
FIRST = Snapshot(round=0, blob=REF, fingerprint="0" * 64)


def plan(topology: str) -> Plan:
    return Plan.model_validate(
        {
            "topology": topology,
            "task": {"name": "dummy"},
            "local": {"steps": 2, "batch_size": 2},
            "rounds": {"total": 50, "snapshot_every": 2, "max_failed": 40},
        }
    )


def some_intent(state: RunState, key: str, choose: random.Random) -> Any:
    """Something that a client might ask for: sensible, late, repeated or nonsense."""
    entries = [entry for open_round in state.rounds.values() for entry in open_round.entries.values()]
    entry = choose.choice(entries) if entries and choose.random() < 0.9 else None
    number = entry.assignment.round if entry else choose.randrange(4)
    assignment = entry.assignment.id if entry else f"{number}-{choose.randrange(9)}"
    near = max(0, state.closed_rounds + choose.choice((-2, -1, 0, 0, 0, 1)))
    fingerprint = choose.choice(("0" * 64, "0" * 64, "1" * 64))
    snapshot = Snapshot(round=near, blob=REF, fingerprint=fingerprint)
    return choose.choice(
        (
            Ready(client=key, round=near),
            Committed(client=key, round=number, assignment=assignment, commit=choose.choice("ef") * 64),
            WorkFailed(client=key, assignment=assignment, reason="x"),
            Verdict(by=key, round=number, assignment=assignment, accepted=choose.random() < 0.7),
            Fingerprinted(client=key, round=max(0, near - 1), fingerprint=fingerprint),
            SnapshotStored(by=key, snapshot=snapshot),
        )
    )


def some_event(state: RunState, choose: random.Random, advances: list[Advance]) -> Event:
    """Mostly what moves a run on; sometimes somebody goes, comes back, or asks for something odd."""
    key = choose.choice(KEYS)
    client = state.clients.get(key)
    if client is None or client.status in ("left", "lost"):
        return Joined(client=key, boot=f"{choose.randrange(2**32):032x}")
    if choose.random() < 0.05:
        return choose.choice(
            (
                Left(client=key, how="left"),
                Suspected(client=key),
                Recovered(client=key),
                Left(client=key, how="lost"),
            )
        )
    if advances and choose.random() < 0.5:
        closing = advances.pop().closing
        return Advanced(round=closing.round, change=REF, fingerprint="0" * 64)
    if client.round is None or client.round < state.closed_rounds:
        return Ready(client=key, round=state.closed_rounds)
    for open_round in state.rounds.values():
        for entry in open_round.entries.values():
            of = {"round": entry.assignment.round, "assignment": entry.assignment.id}
            mine = entry.assignment.client == key
            if mine and entry.status == "assigned" and choose.random() < 0.7:
                return Committed(client=key, commit="e" * 64, **of)
            if mine and entry.status == "committed" and choose.random() < 0.7:
                claims = Claims(norm=1.0, loss=1.0)
                return Contributed(
                    contribution=Contribution(client=key, commit="e" * 64, update=REF, claims=claims, **of)
                )
            if entry.status == "opened" and choose.random() < 0.7:
                by = AGGREGATOR if state.plan.topology == "star" else key
                return Verdict(by=by, accepted=choose.random() < 0.8, **of)
    if state.snapshot_asked is not None and choose.random() < 0.5:
        at, whom, _ = state.snapshot_asked
        return SnapshotStored(by=whom, snapshot=Snapshot(round=at, blob=REF, fingerprint="0" * 64))
    if state.plan.topology == "mesh" and state.closed_rounds and choose.random() < 0.6:
        return Fingerprinted(client=key, round=state.closed_rounds - 1, fingerprint="0" * 64)
    return some_intent(state, key, choose)  # type: ignore[no-any-return]


@pytest.mark.parametrize("topology", ["star", "mesh"])
@pytest.mark.parametrize("seed", range(6))
def test_what_changes_nothing_changes_nothing(topology: str, seed: int) -> None:
    choose = random.Random(f"{topology} {seed}")
    state = initial_state("run", plan(topology), 10_000, FIRST)
    advances: list[Advance] = []
    skipped: dict[str, int] = {}
    for _ in range(400):
        event = some_event(state, choose, advances)
        now = state.now_ms + choose.choice((1, 1, 1, 50, 5000))
        deadline = next_deadline(state)
        if choose.random() < 0.05 and deadline is not None:
            event, now = ClockPassed(), max(now, deadline)
        done = tick(state, [event], now, 1)
        state = done.state
        advances += [e.effect.body for e in done.effects if isinstance(e.effect.body, Advance)]
        for key in KEYS:
            intent = some_intent(state, key, choose)
            if not changes_nothing(state, key, intent):
                continue
            skipped[intent.kind] = skipped.get(intent.kind, 0) + 1
            would = tick(state, [intent], state.now_ms, 1)
            allowed = [e for e in would.effects if e.effect.body.kind != "abandon"]
            assert not allowed, f"{intent} has an effect: {allowed}"
            assert dataclasses.replace(would.state, sequence=0) == dataclasses.replace(state, sequence=0), (
                intent
            )
    assert state.closed_rounds > 3, "the walk has not come far"
    assert {"ready", "committed", "work_failed", "verdict", "fingerprinted"} <= set(skipped)


def test_what_comes_after_the_end_of_a_session_is_left_to_the_coordinator() -> None:
    """It answers that the session is over, which a client must hear."""
    state = initial_state("run", plan("star"), 100, FIRST)
    for event in (Joined(client=KEYS[0], boot="0" * 32), Left(client=KEYS[0], how="lost")):
        state = tick(state, [event], 1, 1).state

    ready = Ready(client=KEYS[0], round=0)
    assert not changes_nothing(state, KEYS[0], ready)
    assert [e.effect.body.kind for e in tick(state, [ready], 2, 1).effects] == ["dismissed"]
