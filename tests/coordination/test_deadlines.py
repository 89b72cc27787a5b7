from __future__ import annotations

import dataclasses
from collections.abc import Callable

from manyhands.coordination.deadlines import round_timeout_ms, snapshot_timeout_ms, typical_ms
from manyhands.coordination.machine import initial_state
from manyhands.coordination.state import RunState
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.plan.schema import Plan

MakePlan = Callable[..., Plan]


def state(plan: Plan, **fields: object) -> RunState:
    first = Snapshot(round=0, blob=BlobRef(blob="b", size_bytes=1), fingerprint="f")
    return dataclasses.replace(initial_state("r", plan, 10, first), **fields)  # type: ignore[arg-type]


ROUNDS = {
    "first_deadline_s": 100.0,
    "deadline_floor_s": 1.0,
    "deadline_ceiling_s": 200.0,
    "deadline_mad_factor": 2.0,
}


def test_the_first_one_is_the_plans(plan: MakePlan) -> None:
    assert round_timeout_ms(state(plan(rounds=ROUNDS))) == 100_000


def test_median_and_mad(plan: MakePlan) -> None:
    measured = state(plan(rounds=ROUNDS), round_ms=(8000, 10_000, 14_000), last_timeout_ms=100_000)
    assert round_timeout_ms(measured) == 10_000 + 2 * 2000
    assert typical_ms(measured) == 10_000


def test_equal_durations_leave_some_room(plan: MakePlan) -> None:
    assert round_timeout_ms(state(plan(rounds=ROUNDS), round_ms=(10_000,) * 5)) == 12_000


def test_floor_ceiling_and_growth(plan: MakePlan) -> None:
    made = plan(rounds=ROUNDS)
    assert round_timeout_ms(state(made, round_ms=(10,))) == 1000
    assert round_timeout_ms(state(made, round_ms=(900_000,))) == 200_000
    assert round_timeout_ms(state(made, round_ms=(90_000,), last_timeout_ms=10_000)) == 15_000


def test_a_round_in_which_nothing_counted_gives_the_next_more_time(plan: MakePlan) -> None:
    made = plan(rounds=ROUNDS)
    assert (
        round_timeout_ms(state(made, round_ms=(10_000,), last_timeout_ms=12_000, failed_in_a_row=1)) == 18_000
    )
    assert (
        round_timeout_ms(state(made, round_ms=(10_000,), last_timeout_ms=190_000, failed_in_a_row=1))
        == 200_000
    )


def test_a_snapshot_has_at_least_twice_the_time_after_which_a_client_is_lost(plan: MakePlan) -> None:
    made = plan(rounds={"lost_after_s": 30.0})
    assert snapshot_timeout_ms(state(made)) == 60_000
    assert snapshot_timeout_ms(state(made, last_timeout_ms=90_000)) == 90_000
