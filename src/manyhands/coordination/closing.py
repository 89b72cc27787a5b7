"""When a round closes, with what, and how its closing becomes public.

A round closes early when everybody who is there is done, and at its deadline otherwise. The closing is made once,
here, and never changed: in a mesh it is published at once, in a star when the aggregator has applied it.
"""

from __future__ import annotations

from manyhands.coordination import data_ranges
from manyhands.coordination.agreement import decide, maybe_close_commits, reveal
from manyhands.coordination.deadlines import (
    KEPT_DURATIONS,
    longer_deadline_ms,
    milliseconds,
    verdict_extension_ms,
)
from manyhands.coordination.effects import Abandon, Advance, Closed, PhaseChanged
from manyhands.coordination.events import Advanced
from manyhands.coordination.newcomers import held_at
from manyhands.coordination.pace import measured_step_us, step_us_of_the_late
from manyhands.coordination.presence import is_live, is_present, live_clients, present_clients
from manyhands.coordination.rounds import (
    books,
    give_back,
    give_out_again,
    may_work_again,
    put_books,
    refuse,
)
from manyhands.coordination.schedule import outer_terms
from manyhands.coordination.snapshots import ask_for_snapshot
from manyhands.coordination.state import Entry, Round
from manyhands.coordination.step import Step
from manyhands.coordination.types import AGGREGATOR, EVERYONE, BlobRef, Closing, Counted, Held, Uncounted


def move_round(step: Step, number: int) -> None:
    """Whatever follows for an open round from what has happened so far and from the time."""
    if step.state.rounds[number].stage == "close":
        return
    mesh = step.state.plan.topology == "mesh"
    if number == step.state.closed_rounds and _a_quorum_is_still_at_work(step, step.state.rounds[number]):
        step.put_round(
            number, deadline_ms=longer_deadline_ms(step.state, step.state.rounds[number], step.now_ms)
        )
    if mesh:
        maybe_close_commits(step, number)
        reveal(step, number)
        decide(step, number)
    if step.state.phase == "training":
        give_out_again(step, number)
    round_ = step.state.rounds[number]
    if number != step.state.closed_rounds:
        return  # closings are published in order
    if step.now_ms < round_.deadline_ms:
        if _everybody_is_done(step, round_):
            close(step, number, at_deadline=False)
        return
    if not mesh and not round_.extended and any(e.status == "opened" for e in round_.entries.values()):
        extension = verdict_extension_ms(step.state)
        step.put_round(number, extended=True, deadline_ms=step.now_ms + extension)
        return
    close(step, number, at_deadline=True)


def _a_quorum_is_still_at_work(step: Step, round_: Round) -> bool:
    """At the deadline: too few have sent, but somebody who is there may still. Closing now would waste all of it."""
    rounds = step.state.plan.rounds
    if step.now_ms < round_.deadline_ms or step.now_ms >= round_.opened_ms + milliseconds(
        rounds.deadline_ceiling_s
    ):
        return False
    mesh = step.state.plan.topology == "mesh"
    sent = ("committed", "opened", "agreed") if mesh else ("opened", "agreed")
    entries = round_.entries.values()
    if round_.commits_closed or sum(e.status in sent for e in entries) >= rounds.quorum:
        return False
    clients = step.state.clients
    return any(
        e.status in ("assigned", "committed") and is_present(clients.get(e.assignment.client))
        for e in entries
    )


def _everybody_is_done(step: Step, round_: Round) -> bool:
    """Nothing is to come from anybody who is there; with nothing agreed, nothing is to come from anybody at all."""
    clients = step.state.clients
    under_way = [e for e in round_.entries.values() if e.status in ("assigned", "committed")]
    if any(e.status == "opened" for e in round_.entries.values()):
        return False
    if any(is_present(clients.get(e.assignment.client)) for e in under_way):
        return False
    if round_.agreed:
        return not under_way or bool(present_clients(step.state))
    if under_way:
        return False
    if step.state.phase != "training":
        return True
    live = live_clients(step.state)
    return bool(live) and not any(may_work_again(round_, client.key) for client in live)


def close(step: Step, number: int, *, at_deadline: bool) -> None:
    """Make the closing: settle every entry, every sample and every measurement of the round."""
    _end_what_is_open(step, number, at_deadline)
    round_ = step.state.rounds[number]
    needed = step.state.plan.rounds.quorum
    if at_deadline and 0 < len(round_.agreed) < needed:
        reason = f"no quorum: {len(round_.agreed)} agreed at the deadline, {needed} are needed"
        for identifier in round_.agreed:
            refuse(step, number, identifier, reason)
        step.put_round(number, agreed=())
        round_ = step.state.rounds[number]
    closing = Closing(
        round=number,
        fragment=round_.terms.fragment,
        counted=tuple(_counted(round_.entries[identifier]) for identifier in round_.agreed),
        uncounted=tuple(
            Uncounted(assignment=e.assignment.id, client=e.assignment.client, reason=e.reason)
            for e in round_.entries.values()
            if e.status != "agreed"
        ),
        outer=outer_terms(step.state.plan, step.state.outer_steps + 1),
        closed_ms=step.now_ms,
    )
    step.put_round(number, stage="close", closing=closing)
    _settle(step, step.state.rounds[number])
    if not closing.counted:
        publish(step, number, None, held_at(step.state, number))
    elif step.state.plan.topology == "mesh":
        publish(step, number, None, None)
    else:
        step.send(AGGREGATOR, Advance(closing=closing))


def _end_what_is_open(step: Step, number: int, at_deadline: bool) -> None:
    mesh = step.state.plan.topology == "mesh"
    for identifier, entry in step.state.rounds[number].entries.items():
        client = step.state.clients.get(entry.assignment.client)
        if entry.status in ("assigned", "committed"):
            if client is not None and is_present(client):
                late = step_us_of_the_late(client, entry, step.now_ms)
                step.put_client(client.key, step_us=late)
                reason = "not done at the deadline"
            else:
                reason = "not there when the round closed"
            give_back(step, number, identifier, reason)
            if is_live(client):
                abandon = Abandon(round=number, assignment=identifier, reason=reason)
                step.send(entry.assignment.client, abandon)
        elif entry.status == "opened":
            assert at_deadline
            who = "a quorum of witnesses" if mesh else "the aggregator"
            refuse(step, number, identifier, f"no verdict of {who} by the deadline")


def _counted(entry: Entry) -> Counted:
    assert entry.contribution is not None
    assert entry.contribution.update is not None
    return Counted(
        assignment=entry.assignment.id,
        client=entry.assignment.client,
        update=entry.contribution.update,
        weight=entry.assignment.weight,
    )


def _settle(step: Step, round_: Round) -> None:
    """Samples of what counts are counted; clients' records and, of what counts, measurements."""
    durations: list[int] = []
    for entry in round_.entries.values():
        client = step.state.clients[entry.assignment.client]
        if entry.status != "agreed":
            step.put_client(client.key, uncounted=client.uncounted + 1)
            continue
        put_books(step, data_ranges.count(books(step.state), entry.assignment.id))
        step.put_client(client.key, counted=client.counted + 1)
        if not round_.interrupted:
            assert entry.opened_ms is not None
            durations.append(max(0, entry.opened_ms - entry.assigned_ms))
            step.put_client(client.key, step_us=measured_step_us(client, entry))
    step.change(round_ms=(*step.state.round_ms, *durations)[-KEPT_DURATIONS:])


def advanced(step: Step, event: Advanced) -> None:
    """The aggregator has applied a closing; its change and fingerprint become public with it."""
    round_ = step.state.rounds.get(event.round)
    if step.state.plan.topology != "star" or round_ is None or round_.closing is None:
        return
    publish(step, event.round, event.change, Held(event.fingerprint))


def publish(step: Step, number: int, change: BlobRef | None, held: Held | None) -> None:
    """The end of a round for everybody: public is one closing further."""
    state = step.state
    round_ = state.rounds[number]
    assert round_.closing is not None
    assert number == state.closed_rounds
    closed = Closed(
        closing=round_.closing,
        change=change,
        fingerprint=None if held is None else held.public,
        outer_fingerprint=None if held is None else held.outer,
    )
    counted = bool(round_.closing.counted)
    step.change(
        rounds={n: other for n, other in state.rounds.items() if n != number},
        closed_rounds=number + 1,
        history=(*state.history, closed),
        outer_steps=state.outer_steps + counted,
        failed_in_a_row=0 if counted else state.failed_in_a_row + 1,
        boundary_ms=step.now_ms,
        opening_ms=None,
    )
    step.closed.append(round_)
    step.send(EVERYONE, closed)
    total, every = state.plan.rounds.total, state.plan.rounds.snapshot_every
    under_way = step.state.snapshot_asked is not None  # one at a time: a slow one is not asked for anew
    if step.state.closed_rounds == total or (step.state.closed_rounds % every == 0 and not under_way):
        ask_for_snapshot(step)
    if step.state.phase == "training" and step.state.failed_in_a_row >= state.plan.rounds.max_failed:
        _pause_after_failures(step, round_.closing)


def _pause_after_failures(step: Step, closing: Closing) -> None:
    times = step.state.failed_in_a_row
    why = "; ".join(dict.fromkeys(entry.reason for entry in closing.uncounted)) or "nobody was there"
    reason = f"{times} rounds in a row without a counted contribution; in round {closing.round}: {why}"
    step.change(phase="paused", resume_to="training", reason=reason)
    step.send(EVERYONE, PhaseChanged(phase="paused", reason=reason))
