"""How much work a client gets: less when it is slow, so that a round ends for all at about the same time.

A client's speed is the time of one optimizer step. It is measured here, from the assignment to the stored update,
and a client's own claim can only lower it; whoever claims to be slow gets less work and a smaller share of data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median_low

from manyhands.coordination.state import Client, Entry
from manyhands.plan.schema import Plan

JITTER = 1.25
"""A client counts as slow from here on, as a multiple of the median: less is noise, and equal work is simpler."""


def median_step_us(clients: Iterable[Client]) -> int | None:
    """Of those that have been measured; None when nobody has."""
    measured = [client.step_us for client in clients if client.step_us is not None]
    return median_low(measured) if measured else None


def steps_for(plan: Plan, step_us: int | None, median_us: int | None, share: float = 1.0) -> int:
    """Steps of an assignment. `share` < 1: of the round that is left."""
    full = plan.local.steps
    if step_us is not None and median_us is not None and step_us > JITTER * median_us:
        share = min(share, median_us / step_us)
    least = math.ceil(full * plan.rounds.min_work_share)
    return min(full, max(1, least, int(full * share)))


def measured_step_us(client: Client, entry: Entry) -> int | None:
    """The client's speed after a counted contribution: half of the old value, half of the new one."""
    assert entry.contribution is not None
    assert entry.opened_ms is not None
    spent_ms = max(0, entry.opened_ms - entry.assigned_ms)
    claims = entry.contribution.claims
    if claims is not None and claims.work_ms > 0:
        spent_ms = min(spent_ms, claims.work_ms)
    measured = spent_ms * 1000 // entry.assignment.steps
    return measured if client.step_us is None else (client.step_us + measured) // 2


def step_us_of_the_late(client: Client, entry: Entry, now_ms: int) -> int:
    """Of a client that was there and not done at the deadline: at least the time that it has had.

    Without this, whoever is too slow for its first round would never be measured and never get less.
    """
    spent_us = max(0, now_ms - entry.assigned_ms) * 1000 // entry.assignment.steps
    return max(client.step_us or 0, spent_us)
