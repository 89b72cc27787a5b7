"""What a client is given to start from, and the fingerprints of what is held after so many closings."""

from __future__ import annotations

from manyhands.coordination.effects import CatchUp
from manyhands.coordination.state import RunState
from manyhands.coordination.types import Fingerprint, Held


def catch_up(state: RunState, has_round: int | None) -> CatchUp:
    """The way to public with the fewest blobs, for a client whose public has seen `has_round` closings."""
    latest = state.snapshots[-1]
    since_snapshot = tuple(closed for closed in state.history if closed.closing.round >= latest.round)
    if has_round is not None and 0 <= has_round <= state.closed_rounds:
        since = tuple(closed for closed in state.history if closed.closing.round >= has_round)
        complete = len(since) == state.closed_rounds - has_round
        if complete and len(since) <= 1 + len(since_snapshot):
            return CatchUp(snapshot=None, closed=since, round=state.closed_rounds)
    earlier = tuple(closed.closing for closed in state.history if closed.closing.round < latest.round)
    return CatchUp(snapshot=latest, closed=since_snapshot, round=state.closed_rounds, earlier=earlier)


def fingerprint_at(state: RunState, closings: int) -> Fingerprint | None:
    """Of public after so many closings; None: not agreed yet, or too long ago."""
    held = held_at(state, closings)
    return None if held is None else held.public


def held_at(state: RunState, closings: int) -> Held | None:
    """What everybody should hold after so many closings; None: not agreed yet, or too long ago."""
    for closed in reversed(state.history):
        if closed.closing.round == closings - 1:
            return closed.held
    for snapshot in state.snapshots:
        if snapshot.round == closings:
            return snapshot.held
    return None
