"""What somebody who has lost everything needs to be told now: all of it can be received twice without harm."""

from __future__ import annotations

import dataclasses

from manyhands.coordination.agreement import unheard
from manyhands.coordination.effects import Advance, Body, Evaluate, PhaseChanged, TakeSnapshot, Work
from manyhands.coordination.newcomers import catch_up
from manyhands.coordination.presence import is_live
from manyhands.coordination.rounds import merge_of, session_ended
from manyhands.coordination.state import RunState
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, ClientId


def situation(state: RunState, who: str) -> tuple[Body, ...]:
    """For a client, AGGREGATOR or EVALUATOR; nothing for a stranger."""
    if who == AGGREGATOR:
        return _of_aggregator(state)
    if who == EVALUATOR:
        known = {snapshot.round: snapshot for snapshot in state.snapshots}
        return tuple(
            Evaluate(snapshot=known[number], checkpoint=final)
            for number, final in sorted(state.to_evaluate.items())
        )
    return _of_client(state, who)


def _of_aggregator(state: RunState) -> tuple[Body, ...]:
    """First what it has accepted, in the order of its verdicts, so that its sum becomes the same again."""
    bodies: list[Body] = []
    if state.plan.topology == "star":
        for round_ in state.rounds.values():
            bodies += [merge_of(round_.entries[identifier]) for identifier in round_.agreed]
            bodies += [merge_of(entry) for entry in round_.entries.values() if entry.status == "opened"]
            if round_.closing is not None:
                bodies.append(Advance(closing=round_.closing))
        if state.snapshot_asked is not None:
            bodies.append(TakeSnapshot(round=state.snapshot_asked[0]))
    return tuple(bodies)


def _of_client(state: RunState, key: ClientId) -> tuple[Body, ...]:
    client = state.clients.get(key)
    if client is None:
        return ()
    if not is_live(client):
        return (session_ended(client),)
    bodies: list[Body] = [PhaseChanged(phase=state.phase, reason=state.reason)]
    if client.status == "catching_up":
        bodies.append(catch_up(state, None))
    elif client.round is not None and client.round < state.closed_rounds:
        bodies.append(catch_up(state, client.round))
    for number, round_ in state.rounds.items():
        terms = dataclasses.replace(round_.terms, deadline_ms=round_.deadline_ms)
        for entry in round_.entries.values():
            if entry.assignment.client == key and entry.status in ("assigned", "committed"):
                bodies.append(Work(assignment=entry.assignment, terms=terms))
        reveal = unheard(state, number, key) if round_.commits_closed else None
        if reveal is not None:
            bodies.append(reveal)
    if state.snapshot_asked is not None and state.snapshot_asked[1] == key:
        bodies.append(TakeSnapshot(round=state.snapshot_asked[0]))
    return tuple(bodies)
