"""Snapshots, fingerprints, evaluation, and what a newcomer is given to start from.

A snapshot is asked for every `rounds.snapshot_every` closings and at the end: of the aggregator in a star, of the
most reliable client that is there in a mesh, and of another one when it does not come in time. It is accepted only
with the fingerprint that is agreed for its round: the aggregator's in a star; in a mesh the one that most of the
present clients report, or, when all have reported and none has most, that of the largest group (of two equal
groups the one with the most reliable client). A client with another one starts again from a snapshot.

Two snapshots stay, with the closings since the older one, so that who is downloading the older one is not left
alone; and closings that `rounds.keep_updates` asks for.
"""

from __future__ import annotations

import dataclasses
import math

from manyhands.coordination.deadlines import snapshot_timeout_ms
from manyhands.coordination.presence import by_reliability, is_live, is_present, present_clients
from manyhands.coordination.rounds import release_work
from manyhands.coordination.state import RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import (
    AGGREGATOR,
    EVALUATOR,
    BlobId,
    CatchUp,
    Checkpointed,
    ClientId,
    Evaluate,
    Evaluated,
    Fingerprint,
    Fingerprinted,
    Snapshot,
    SnapshotStored,
    TakeSnapshot,
)

NOBODY = ""
KEPT_SNAPSHOTS = 2
MOST_WAITING = 2
"""Older snapshots that are kept because the evaluator has not come to them; beyond that the oldest go unevaluated."""


# -------------------------------------------------------------------------------------- newcomers
def catch_up(state: RunState, has_round: int | None) -> CatchUp:
    """The way to public with the fewest blobs, for a client whose public has seen `has_round` closings."""
    latest = state.snapshots[-1]
    since_snapshot = tuple(closed for closed in state.history if closed.closing.round >= latest.round)
    if has_round is not None and 0 <= has_round <= state.closed_rounds:
        since = tuple(closed for closed in state.history if closed.closing.round >= has_round)
        complete = len(since) == state.closed_rounds - has_round
        if complete and len(since) <= 1 + len(since_snapshot):
            return CatchUp(snapshot=None, closed=since, round=state.closed_rounds)
    return CatchUp(snapshot=latest, closed=since_snapshot, round=state.closed_rounds)


def fingerprint_at(state: RunState, closings: int) -> Fingerprint | None:
    """Of public after so many closings; None: not agreed yet, or too long ago."""
    for closed in reversed(state.history):
        if closed.closing.round == closings - 1:
            return closed.fingerprint
    for snapshot in state.snapshots:
        if snapshot.round == closings:
            return snapshot.fingerprint
    return None


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


# ----------------------------------------------------------------------------------- fingerprints
def fingerprinted(step: Step, event: Fingerprinted) -> None:
    """A client's report. Where the agreed fingerprint is known and differs, the client starts again."""
    client = step.state.clients.get(event.client)
    if client is None or not is_live(client) or client.status != "ready":
        return
    if all(closed.closing.round != event.round for closed in step.state.history):
        return
    if step.state.plan.topology == "mesh":
        of_round = {**step.state.fingerprints.get(event.round, {}), event.client: event.fingerprint}
        step.change(fingerprints={**step.state.fingerprints, event.round: of_round})
    agreed = fingerprint_at(step.state, event.round + 1)
    if agreed is not None and agreed != event.fingerprint:
        _resync(step, event.client, event.round)


def agree_on_fingerprints(step: Step) -> None:
    """Mesh: for every closing whose fingerprint is not known yet, see whether the reports suffice."""
    if step.state.plan.topology != "mesh":
        return
    for at, closed in enumerate(step.state.history):
        reports = step.state.fingerprints.get(closed.closing.round)
        if closed.fingerprint is not None or not reports:
            continue
        agreed = _agreed(step.state, reports)
        if agreed is None:
            continue
        history = list(step.state.history)
        history[at] = dataclasses.replace(closed, fingerprint=agreed)
        step.change(history=tuple(history))
        for client, fingerprint in reports.items():
            if fingerprint != agreed:
                _resync(step, client, closed.closing.round)


def _agreed(state: RunState, reports: dict[ClientId, Fingerprint]) -> Fingerprint | None:
    voters = {client.key for client in present_clients(state) if client.status == "ready"} | set(reports)
    groups: dict[Fingerprint, list[ClientId]] = {}
    for client, fingerprint in reports.items():
        groups.setdefault(fingerprint, []).append(client)
    largest = max(len(members) for members in groups.values())
    if 2 * largest <= len(voters) and len(reports) < len(voters):
        return None
    candidates = [f for f, members in groups.items() if len(members) == largest]
    known = [state.clients[client] for client in reports if client in state.clients]
    order = by_reliability(known)
    return min(candidates, key=lambda f: min(order.index(client) for client in groups[f]))


def _resync(step: Step, key: ClientId, number: int) -> None:
    """Its public is not everybody's: what it works on is worth nothing, and it starts from a snapshot."""
    client = step.state.clients.get(key)
    if client is None or client.status != "ready":
        return
    release_work(step, key, f"its public differed from the agreed one after round {number}")
    step.put_client(key, status="catching_up", round=None, resynced=client.resynced + 1)
    step.send(key, catch_up(step.state, None))


# -------------------------------------------------------------------------------------- snapshots
def ask_for_snapshot(step: Step, *, instead_of: ClientId = NOBODY) -> None:
    """Of public as it is now, after the latest closing. A newer request replaces an older one."""
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
    gone = whom != AGGREGATOR and not is_present(step.state.clients.get(whom))
    if gone or step.now_ms >= when_ms + snapshot_timeout_ms(step.state):
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
    step.change(snapshot_offered=snapshot)
    take_offered_snapshot(step)


def take_offered_snapshot(step: Step) -> None:
    """Accept the one that was stored as soon as the fingerprint of its round is agreed; drop a wrong one."""
    snapshot, asked = step.state.snapshot_offered, step.state.snapshot_asked
    if snapshot is None:
        return
    agreed = fingerprint_at(step.state, snapshot.round)
    if agreed is None:
        return
    step.change(snapshot_offered=None)
    if agreed != snapshot.fingerprint:
        if step.state.plan.topology == "mesh" and asked is not None:
            ask_for_snapshot(step, instead_of=asked[1])
        return
    if asked is not None and asked[0] <= snapshot.round:
        step.change(snapshot_asked=None)
    keep_snapshot(step, snapshot)


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
        fingerprints={r: reports for r, reports in state.fingerprints.items() if r in remembered},
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
