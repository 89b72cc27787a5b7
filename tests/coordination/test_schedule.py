from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from manyhands.coordination.schedule import (
    cosine_of_half_turns,
    learning_rates,
    outer_terms,
    power,
    share_of_peak,
)
from manyhands.coordination.types import OuterTerms
from manyhands.plan.schema import Plan

MakePlan = Callable[..., Plan]


def shares(plan: Plan, steps: range) -> list[float]:
    return [share_of_peak(plan, step) for step in steps]


def test_warm_up_then_constant(plan: MakePlan) -> None:
    constant = plan(schedule={"kind": "constant", "warmup_steps": 4})
    assert shares(constant, range(6)) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_ends_at_final(plan: MakePlan) -> None:
    linear = plan(schedule={"kind": "linear", "total_steps": 10, "final": 0.1})
    assert share_of_peak(linear, 0) == 1.0
    assert share_of_peak(linear, 5) == pytest.approx(0.55)
    assert shares(linear, range(10, 13)) == pytest.approx([0.1, 0.1, 0.1])


def test_cosine_is_a_cosine(plan: MakePlan) -> None:
    cosine = plan(schedule={"kind": "cosine", "total_steps": 110, "warmup_steps": 10, "final": 0.2})
    for step in range(10, 120, 7):
        done = min(1.0, (step - 10) / 100)
        assert share_of_peak(cosine, step) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * done)))


def test_wsd_is_stable_then_decays(plan: MakePlan) -> None:
    wsd = plan(schedule={"kind": "wsd", "total_steps": 100, "decay_steps": 20, "final": 0.0})
    assert shares(wsd, range(70, 81)) == [1.0] * 11
    assert share_of_peak(wsd, 90) == pytest.approx(0.5)
    assert share_of_peak(wsd, 100) == 0.0
    tenth = plan(schedule={"kind": "wsd", "total_steps": 100, "final": 0.0})
    assert (share_of_peak(tenth, 90), share_of_peak(tenth, 95)) == (1.0, pytest.approx(0.5))


def test_the_default_length_is_the_run(plan: MakePlan) -> None:
    linear = plan(schedule={"kind": "linear", "final": 0.0}, rounds={"total": 3}, local={"steps": 4})
    assert share_of_peak(linear, 12) == 0.0
    assert share_of_peak(linear, 11) > 0.0


def test_learning_rates_of_a_round(plan: MakePlan) -> None:
    made = plan(
        schedule={"kind": "constant", "warmup_steps": 6}, local={"steps": 4, "optimizer": {"lr": 0.6}}
    )
    assert learning_rates(made, 4) == pytest.approx((0.5, 0.6, 0.6, 0.6))


def test_own_cosine_and_power_agree_with_libm() -> None:
    for i in range(1001):
        assert cosine_of_half_turns(i / 1000) == pytest.approx(math.cos(math.pi * i / 1000), abs=4e-15)
    for exponent in (0, 1, 2, 3, 17, 1000):
        assert power(0.99, exponent) == pytest.approx(0.99**exponent, rel=1e-13)


def test_outer_terms(plan: MakePlan) -> None:
    adam = plan(outer={"name": "adamw", "lr": 0.5, "beta1": 0.9, "beta2": 0.99})
    assert outer_terms(adam, 1) == OuterTerms(lr=0.5, bias1=1 - 0.9, bias2=1 - 0.99)
    assert outer_terms(adam, 3).bias1 == pytest.approx(1 - 0.9**3)
    off = plan(outer={"name": "adamw", "lr": 0.5, "bias_correction": False})
    assert outer_terms(off, 3) == OuterTerms(lr=0.5)
    assert outer_terms(plan(outer={"name": "nesterov", "lr": 0.7}), 3) == OuterTerms(lr=0.7)
