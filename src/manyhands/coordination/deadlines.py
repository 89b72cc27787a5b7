"""How long a round may take: median + k * MAD of counted contributions' durations.

MAD counts as a tenth of the median at least: a deadline must not sit on the heels of clients that happened to be
equally fast. Only counted contributions are measured; but after a round in which nothing counted the next one gets
half as much again, up to the ceiling, because a deadline that all miss would otherwise never be put right.
"""

from __future__ import annotations

from statistics import median

from manyhands.coordination.state import Round, RunState

KEPT_DURATIONS = 50
GROWTH = 1.5
LEAST_MAD_SHARE = 0.1


def milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def round_timeout_ms(state: RunState) -> int:
    """For a round that opens now."""
    rounds = state.plan.rounds
    last = state.last_timeout_ms
    if state.round_ms:
        middle = median(state.round_ms)
        mad = median(abs(duration - middle) for duration in state.round_ms)
        timeout = middle + rounds.deadline_mad_factor * max(mad, LEAST_MAD_SHARE * middle)
        timeout = min(timeout, rounds.deadline_ceiling_s * 1000)
        if last is not None:
            timeout = min(timeout, GROWTH * last)
        timeout = max(timeout, rounds.deadline_floor_s * 1000)
    else:
        timeout = rounds.first_deadline_s * 1000
    if state.failed_in_a_row and last is not None:
        timeout = max(timeout, min(GROWTH * last, rounds.deadline_ceiling_s * 1000))
    return max(1, int(timeout))


def longer_deadline_ms(state: RunState, round_: Round, now_ms: int) -> int:
    """Of a round that has not got its quorum by its deadline: half as long again, up to the ceiling."""
    rounds = state.plan.rounds
    more = max(milliseconds(rounds.deadline_floor_s), (now_ms - round_.opened_ms) // 2)
    return min(now_ms + more, round_.opened_ms + milliseconds(rounds.deadline_ceiling_s))


def typical_ms(state: RunState) -> int | None:
    """Median duration of a counted contribution; None while nothing is measured."""
    return int(median(state.round_ms)) if state.round_ms else None


def verdict_extension_ms(state: RunState) -> int:
    """By how much a deadline moves, once, for updates that are stored and wait for the aggregator's verdict."""
    floor = milliseconds(state.plan.rounds.deadline_floor_s)
    return max(floor, (state.last_timeout_ms or 0) // 2)


def snapshot_timeout_ms(state: RunState) -> int:
    """How long whoever was asked for a snapshot has to store it."""
    return max(2 * milliseconds(state.plan.rounds.lost_after_s), state.last_timeout_ms or 0, 1000)
