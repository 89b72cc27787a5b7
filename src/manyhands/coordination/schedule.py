"""Learning rates and the outer optimizer's terms: computed once, here, and published with the round.

Only +, -, * and / on floats, so that two machines that replay a log get the same bits: libm's cos and pow differ
between systems in the last place.
"""

from __future__ import annotations

import math

from manyhands.coordination.types import OuterTerms
from manyhands.plan.schema import Plan


def learning_rates(plan: Plan, first_step: int) -> tuple[float, ...]:
    """The inner learning rate of each of plan.local.steps steps, counted from `first_step` of the run."""
    peak = plan.local.optimizer.lr
    return tuple(peak * share_of_peak(plan, first_step + i) for i in range(plan.local.steps))


def share_of_peak(plan: Plan, step: int) -> float:
    """Of inner step `step` (from 0): 0 < share <= 1 in the warm-up, then from 1 down to schedule.final."""
    schedule = plan.schedule
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return 1.0
    total = schedule.total_steps or plan.rounds.total * plan.local.steps
    start = schedule.warmup_steps
    if schedule.kind == "wsd":
        start = max(start, total - (schedule.decay_steps or max(1, total // 10)))
    done = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    left = 1.0 - done
    if schedule.kind == "cosine":
        left = 0.5 * (1.0 + cosine_of_half_turns(done))
    return schedule.final + (1.0 - schedule.final) * left


def cosine_of_half_turns(x: float) -> float:
    """cos(pi * x) for 0 <= x <= 1, as 1 - 2 sin^2(pi x / 2) with the sine's Taylor series; error below 1e-15."""
    angle = 0.5 * math.pi * x
    square = angle * angle
    term = sine = angle
    for n in range(1, 14):
        term = -term * square / (2 * n * (2 * n + 1))
        sine = sine + term
    return 1.0 - 2.0 * sine * sine


def power(base: float, exponent: int) -> float:
    """base ** exponent by repeated squaring; exponent >= 0."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


def outer_terms(plan: Plan, t: int) -> OuterTerms:
    """The t-th step (from 1) of the outer optimizer. Kingma and Ba 2015: bias corrections 1 - beta^t."""
    outer = plan.outer
    if outer.name != "adamw" or not outer.bias_correction:
        return OuterTerms(lr=outer.lr)
    return OuterTerms(lr=outer.lr, bias1=1.0 - power(outer.beta1, t), bias2=1.0 - power(outer.beta2, t))
