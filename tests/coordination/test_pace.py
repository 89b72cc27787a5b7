from __future__ import annotations

from collections.abc import Callable

import pytest

from manyhands.coordination.pace import (
    measured_step_us,
    median_step_us,
    step_us_of_the_late,
    steps_for,
)
from manyhands.coordination.state import Client, Entry
from manyhands.coordination.types import Assignment, Claims, Contribution
from manyhands.plan.schema import Plan

MakePlan = Callable[..., Plan]


def client(step_us: int | None) -> Client:
    return Client(key="a", boot="1", label="", status="ready", step_us=step_us)


def entry(work_ms: int) -> Entry:
    work = Assignment(id="0-0", round=0, client="a", steps=10, batch_size=1, ranges=(), weight=1, seed=0)
    sent = Contribution(
        assignment="0-0", round=0, client="a", commit="", claims=Claims(norm=1.0, work_ms=work_ms)
    )
    return Entry(assignment=work, status="agreed", assigned_ms=1000, opened_ms=3000, contribution=sent)


@pytest.mark.parametrize(
    ("step_us", "steps"), [(None, 40), (50, 40), (100, 40), (120, 40), (200, 20), (399, 10), (4000, 10)]
)
def test_a_slow_client_gets_less_down_to_a_floor(plan: MakePlan, step_us: int | None, steps: int) -> None:
    made = plan(local={"steps": 40}, rounds={"min_work_share": 0.25})
    assert steps_for(made, step_us, 100) == steps


def test_equal_work_for_all_on_request_and_at_least_one_step(plan: MakePlan) -> None:
    assert steps_for(plan(local={"steps": 40}, rounds={"min_work_share": 1.0}), 4000, 100) == 40
    assert steps_for(plan(local={"steps": 1}, rounds={"min_work_share": 0.0}), 4000, 100) == 1
    assert steps_for(plan(local={"steps": 40}), 4000, None) == 40


def test_part_of_a_round(plan: MakePlan) -> None:
    assert steps_for(plan(local={"steps": 40}), None, None, share=0.5) == 20


def test_measured_here_and_lowered_by_the_claim_only() -> None:
    assert measured_step_us(client(None), entry(work_ms=0)) == 200_000
    assert measured_step_us(client(None), entry(work_ms=1000)) == 100_000
    assert measured_step_us(client(None), entry(work_ms=9_000_000)) == 200_000
    assert measured_step_us(client(100_000), entry(work_ms=0)) == 150_000


def test_who_is_late_is_at_least_so_slow() -> None:
    assert step_us_of_the_late(client(None), entry(0), now_ms=6000) == 500_000
    assert step_us_of_the_late(client(700_000), entry(0), now_ms=6000) == 700_000


def test_median_of_the_measured() -> None:
    assert median_step_us([client(None), client(5), client(9), client(1)]) == 5
    assert median_step_us([client(None)]) is None
