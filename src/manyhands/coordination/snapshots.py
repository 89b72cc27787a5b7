"""Snapshots and their evaluation.

A snapshot is asked for every `rounds.snapshot_every` closings and at the end: of the aggregator in a star, of the
most reliable client that is there in a mesh, and of another one when it does not come in time. It is accepted only
with the fingerprints that are agreed for its round (fingerprints.py).

Two snapshots stay, with the closings since the older one, so that who is downloading the older one is not left
alone; and closings that `rounds.keep_updates` asks for.
"""

from __future__ import annotations

import math

from manyhands.coordination.deadlines import snapshot_timeout_ms
from manyhands.coordination.effects import Evaluate, TakeSnapshot
from manyhands.coordination.events import Checkpointed, Evaluated, SnapshotStored
from manyhands.coordination.fingerprints import (
    agree_anew,
    agree_on_fingerprints,
    note_report,
    resync,
)
from manyhands.coordination.newcomers import held_at
from manyhands.coordination.presence import by_reliability, is_present, present_clients
from manyhands.coordination.state import RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, BlobId, ClientId, Snapshot

NOBODY = ""
KEPT_SNAPSHOTS = 2
MOST_WAITING = 2
"""Older snapshots that are kept because the evaluator has not come to them; beyond that the oldest go unevaluated."""


def kept_blobs(state: RunState) -> frozenset[BlobId]:
    """What must not be deleted: snapshots, and the changes and updates that somebody may still have to fetch."""
    blobs = {snapshot.blob.blob for snapshot in state.snapshots}
    if state.snapshot_offered is not None:
        blobs.add(state.snapshot_offered.blob.blob)
    for round_ in state.rounds.values():
        for entry in round_.entries.values():
            if entry.contribution is not None and entry.contribution.update is not None:
                blobs.add(entry.contribution.update.blob)
    mesh = state.plan.topology == "mesh"
    for closed in state.history:
        if closed.change is not None:
            blobs.add(closed.change.blob)
        if mesh or closed.closing.round >= state.closed_rounds - state.plan.rounds.keep_updates:
            blobs |= {counted.update.blob for counted in closed.closing.counted}
    return frozenset(blobs)


def ask_for_snapshot(step: Step, *, instead_of: ClientId = NOBODY) -> None:
    """Of public as it is now, after the latest closing. It replaces a request that is under way."""
    closed = step.state.closed_rounds
    whom = _whom_to_ask(step.state, instead_of)
    step.change(snapshot_asked=(closed, whom, step.now_ms))
    if whom != NOBODY:
        step.send(whom, TakeSnapshot(round=closed))


def _whom_to_ask(state: RunState, instead_of: ClientId) -> str:
    """The aggregator; in a mesh the most reliable client that is about as far as the run, another one if possible."""
    if state.plan.topology == "star":
        return AGGREGATOR
    ready = [c for c in present_clients(state) if c.status == "ready"]
    near = by_reliability([c for c in ready if c.round is not None and c.round >= state.closed_rounds - 1])
    others = [key for key in near if key != instead_of]
    return (others or near or [NOBODY])[0]


def watch_snapshot(step: Step) -> None:
    """Ask another one when whoever was asked is gone or late."""
    asked = step.state.snapshot_asked
    if asked is None:
        return
    _, whom, when_ms = asked
    if whom == NOBODY:
        if _whom_to_ask(step.state, NOBODY) != NOBODY:
            ask_for_snapshot(step)
        return
    late = step.now_ms >= when_ms + snapshot_timeout_ms(step.state)
    if late and step.state.snapshot_offered is not None:
        agree_on_fingerprints(step, overdue=step.state.snapshot_offered.round - 1)
        take_offered_snapshot(step)
        late = step.state.snapshot_offered is not None  # nothing is known of its round any more
        step.change(snapshot_offered=None)
    if step.state.snapshot_asked != asked:
        return
    if late or (whom != AGGREGATOR and not is_present(step.state.clients.get(whom))):
        ask_for_snapshot(step, instead_of=whom)


def snapshot_stored(step: Step, event: SnapshotStored) -> None:
    """Keep it when it comes from whom we asked and is what everybody agrees on."""
    state = step.state
    mesh = state.plan.topology == "mesh"
    whom = AGGREGATOR
    if mesh:
        whom = state.snapshot_asked[1] if state.snapshot_asked is not None else NOBODY
    snapshot = event.snapshot
    if event.by != whom or not state.snapshots[-1].round < snapshot.round <= state.closed_rounds:
        return
    if mesh:  # whoever stores it says by that what it holds
        note_report(step, event.by, snapshot.round - 1, snapshot.held)
        agree_on_fingerprints(step)
    step.change(snapshot_offered=snapshot)
    take_offered_snapshot(step)


def take_offered_snapshot(step: Step) -> None:
    """Accept the one that was stored as soon as the fingerprints of its round are agreed; drop a wrong one."""
    snapshot = step.state.snapshot_offered
    agreed = None if snapshot is None else held_at(step.state, snapshot.round)
    if snapshot is None or agreed is None:
        return
    step.change(snapshot_offered=None)
    if agreed != snapshot.held and not _set_right(step, snapshot):
        return
    asked = step.state.snapshot_asked
    if asked is not None and asked[0] <= snapshot.round:
        step.change(snapshot_asked=None)
    keep_snapshot(step, snapshot)


def _set_right(step: Step, snapshot: Snapshot) -> bool:
    """Mesh: a wrong snapshot. Its client starts again and another one is asked; or, when it has already done so and
    nobody holds what was agreed any more, what it stored is right. Otherwise the next is asked in time.
    """
    asked = step.state.snapshot_asked
    if step.state.plan.topology == "star" or asked is None:
        return False
    resync(step, asked[1], snapshot.round - 1)
    client = step.state.clients.get(asked[1])
    if client is None or client.status != "ready":
        ask_for_snapshot(step, instead_of=asked[1])
        return False
    return agree_anew(step, snapshot.round - 1) == snapshot.held


def keep_snapshot(step: Step, snapshot: Snapshot) -> None:
    """Add an accepted snapshot, have it evaluated when it is its turn, and forget what nobody needs any more."""
    state = step.state
    rounds, evaluation = state.plan.rounds, state.plan.evaluation
    final = snapshot.round == rounds.total
    every = evaluation.every_snapshots
    to_evaluate = dict(state.to_evaluate)
    if final or state.snapshots_taken == 0 or (every and state.snapshots_taken % every == 0):
        to_evaluate[snapshot.round] = final
        step.send(EVALUATOR, Evaluate(snapshot=snapshot, checkpoint=final))
    known = {kept.round: kept for kept in (*state.snapshots, snapshot)}
    recent = sorted(known)[-KEPT_SNAPSHOTS:]
    waiting = [r for r in sorted(to_evaluate) if r not in recent]
    for skipped in waiting[:-MOST_WAITING]:
        del to_evaluate[skipped]
    oldest = min(recent[0], state.closed_rounds - rounds.keep_updates)
    history = tuple(closed for closed in state.history if closed.closing.round >= oldest)
    remembered = {closed.closing.round for closed in history}
    step.change(
        snapshots=tuple(known[r] for r in sorted(known) if r in recent or r in to_evaluate),
        snapshots_taken=state.snapshots_taken + 1,
        to_evaluate=to_evaluate,
        history=history,
        reported={r: reports for r, reports in state.reported.items() if r in remembered},
    )


# ------------------------------------------------------------------------------------- evaluation
def evaluated(step: Step, event: Evaluated) -> None:
    """The first result for a snapshot stands; a loss that is not finite is kept as infinity."""
    if event.round not in step.state.to_evaluate or event.round in step.state.evaluations:
        return
    loss = event.loss if event.loss is None or math.isfinite(event.loss) else math.inf
    step.change(evaluations={**step.state.evaluations, event.round: loss})
    _forget_evaluated(step, event.round)


def checkpointed(step: Step, event: Checkpointed) -> None:
    if event.round not in step.state.to_evaluate or not step.state.to_evaluate[event.round]:
        return
    step.change(checkpointed=event.round)
    _forget_evaluated(step, event.round)


def _forget_evaluated(step: Step, number: int) -> None:
    """Nothing is asked of the evaluator for this snapshot any more."""
    state = step.state
    if number in state.evaluations and (not state.to_evaluate[number] or state.checkpointed == number):
        step.change(to_evaluate={r: final for r, final in state.to_evaluate.items() if r != number})
