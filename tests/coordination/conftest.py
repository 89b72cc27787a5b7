"""A desk at which a test plays everybody: it says what happened, and sees the state and the effects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from manyhands.coordination.data_ranges import balance
from manyhands.coordination.effects import Body, Closed, Effect
from manyhands.coordination.events import (
    Advanced,
    ClockPassed,
    Committed,
    Contributed,
    Event,
    Fingerprinted,
    Joined,
    Ready,
    Verdict,
)
from manyhands.coordination.machine import initial_state, next_deadline, tick
from manyhands.coordination.records import Record
from manyhands.coordination.state import Entry, Round, RunState
from manyhands.coordination.types import AGGREGATOR, Assignment, BlobRef, Claims, Contribution, Snapshot
from manyhands.plan.schema import Plan

SEED = 7
B = TypeVar("B")


class Desk:
    """A run from its first event on. Times start at `now_ms` = 1000 and move only when a test says so."""

    def __init__(self, plan: Plan, samples: int) -> None:
        first = Snapshot(round=0, blob=BlobRef(blob="first", size_bytes=1), fingerprint="f0")
        self.initial = initial_state("run-1", plan, samples, first)
        self.state: RunState = self.initial
        self.now_ms = 1000
        self.records: list[Record] = []
        self.effects: list[Effect] = []  # of the latest `do`
        self.all_effects: list[Effect] = []
        self.closed: list[Round] = []

    def do(self, *events: Event) -> list[Effect]:
        self.effects = []
        for event in events:
            done = tick(self.state, (event,), self.now_ms, SEED)
            self.state = done.state
            record = Record(sequence=done.state.sequence, now_ms=self.now_ms, seed=SEED, event=event)
            self.records.append(record)
            self.effects += [numbered.effect for numbered in done.effects]
            self.closed += done.closed
        self.all_effects += self.effects
        for ledger in (*self.state.older_data, self.state.data):
            assert sum(balance(ledger).values()) == ledger.total
        deadline = next_deadline(self.state)
        assert deadline is None or deadline > self.state.now_ms
        return self.effects

    def after(self, milliseconds: int) -> list[Effect]:
        self.now_ms += milliseconds
        return self.do(ClockPassed())

    def at_deadline(self) -> list[Effect]:
        deadline = next_deadline(self.state)
        assert deadline is not None
        self.now_ms = max(self.now_ms, deadline)
        return self.do(ClockPassed())

    def sent(self, kind: type[B], to: str | None = None) -> list[B]:
        """The bodies of this kind among the latest effects."""
        return [e.body for e in self.effects if isinstance(e.body, kind) and to in (None, e.to)]

    def join(self, *keys: str, boot: str = "1", has_round: int | None = None) -> None:
        self.do(*[Joined(client=key, boot=f"{key}{boot}", has_round=has_round) for key in keys])

    def ready(self, *keys: str) -> list[Effect]:
        return self.do(*[Ready(client=key, round=self.state.closed_rounds) for key in keys])

    @property
    def round(self) -> Round:
        return self.state.rounds[min(self.state.rounds)]

    def entry(self, key: str) -> Entry:
        """Of the open round: the latest one of this client."""
        return [e for e in self.round.entries.values() if e.assignment.client == key][-1]

    def work(self, key: str) -> Assignment:
        return self.entry(key).assignment

    def commit(self, *keys: str) -> list[Effect]:
        return self.do(*[_commit(self.work(key)) for key in keys])

    def send(self, *keys: str, **claims: Any) -> list[Effect]:
        """Commit and open."""
        works = [self.work(key) for key in keys]
        said: list[Event] = [_commit(work) for work in works]
        return self.do(*said, *[contribution(work, **claims) for work in works])

    def accept(self, *keys: str) -> list[Effect]:
        works = [self.work(key) for key in keys]
        return self.do(
            *[Verdict(by=AGGREGATOR, round=w.round, assignment=w.id, accepted=True) for w in works]
        )

    def advance(self) -> list[Effect]:
        number = self.state.closed_rounds
        change = BlobRef(blob=f"change{number}", size_bytes=1)
        return self.do(Advanced(round=number, change=change, fingerprint=f"f{number + 1}"))

    def whole_round(self, *keys: str) -> None:
        """Star: work, merge, close, apply; the next round is open afterwards."""
        self.send(*keys)
        self.accept(*keys)
        self.advance()
        self.ready(*keys)

    def whole_mesh_round(self, *keys: str) -> None:
        self.send(*keys)
        number = self.state.closed_rounds
        works = [self.work(key) for key in keys]
        for work in works:
            for key in keys:
                if self.state.closed_rounds == number:
                    self.do(Verdict(by=key, round=number, assignment=work.id, accepted=True))
        self.do(*[Fingerprinted(client=k, round=number, fingerprint=f"f{number + 1}") for k in keys])
        self.ready(*keys)

    def closings(self) -> list[Closed]:
        return [effect.body for effect in self.all_effects if isinstance(effect.body, Closed)]


def _commit(work: Assignment) -> Committed:
    return Committed(client=work.client, round=work.round, assignment=work.id, commit=f"h{work.id}")


def contribution(work: Assignment, *, commit: str | None = None, **claims: Any) -> Contributed:
    return Contributed(
        contribution=Contribution(
            assignment=work.id,
            round=work.round,
            client=work.client,
            commit=f"h{work.id}" if commit is None else commit,
            update=BlobRef(blob=f"u{work.id}", size_bytes=10),
            nonce="n",
            claims=Claims(**{"norm": 1.0, **claims}),
            signature="s",
        )
    )


def make_plan(**sections: Any) -> Plan:
    """A small plan; `rounds={...}` and so on override single settings."""
    base: dict[str, Any] = {
        "task": {"name": "dummy"},
        "local": {"steps": 4, "batch_size": 2},
        "rounds": {"total": 3, "first_deadline_s": 100.0, "deadline_floor_s": 10.0, "snapshot_every": 2},
    }
    for name, value in sections.items():
        base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) else value
    return Plan.parse(base)


MakeDesk = Callable[..., Desk]


@pytest.fixture
def desk() -> MakeDesk:
    """desk(clients=3, samples=1000, **plan sections): `clients` of them ("a", "b", ...) are at work in round 0."""

    def make(clients: int = 3, samples: int = 1000, **sections: Any) -> Desk:
        made = Desk(make_plan(**{"membership": {"min_clients": max(1, clients)}, **sections}), samples)
        keys = "abcdefghijklmnopqrstuvwxyz"[:clients]
        made.join(*keys)
        if clients:
            made.ready(*keys)
        return made

    return make


@pytest.fixture
def plan() -> Callable[..., Plan]:
    return make_plan


@pytest.fixture
def contribute() -> Callable[..., Contributed]:
    return contribution


def bodies(effects: list[Effect]) -> list[Body]:
    return [effect.body for effect in effects]
