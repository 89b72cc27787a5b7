"""The participants of a simulated run: what each does when the coordinator tells it something.

They stand for a client's node and worker, the aggregator and the evaluator of a networked run. Each answers with
events, and with the virtual time at which they happen: work takes one millisecond for a step, whatever it takes on
this machine, so that all are equally fast and a simulation is the same each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from manyhands.coordination.effects import (
    Advance,
    Body,
    CatchUp,
    Closed,
    Evaluate,
    Merge,
    Reveal,
    TakeSnapshot,
    Work,
)
from manyhands.coordination.events import (
    Advanced,
    Checkpointed,
    Committed,
    Contributed,
    Evaluated,
    Event,
    Fingerprinted,
    Ready,
    SnapshotStored,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.types import AGGREGATOR, Contribution, Fingerprint, Held, Snapshot
from manyhands.errors import UpdateError, WorkerError
from manyhands.simulation.scratch import Scratch
from manyhands.simulation.stage import Stage
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.participant import Participant

Happening = tuple[int, Event]
"""(virtual ms, what happens then)"""

MS_PER_STEP = 1


class SimulatedClient:
    """One client: it works, applies closings, and in a mesh judges the updates of the others."""

    def __init__(self, key: str, stage: Stage, scratch: Scratch) -> None:
        self.key = key
        self._stage, self._scratch = stage, scratch
        self._participant: Participant | None = None

    @property
    def participant(self) -> Participant:
        assert self._participant is not None, "the coordinator sends a CatchUp first"
        return self._participant

    def receive(self, body: Body, now_ms: int) -> list[Happening]:
        match body:
            case CatchUp():
                events = self._catch_up(body)
            case Work():
                return self._work(body, now_ms)
            case Closed():
                events = [*self._close(body), Ready(client=self.key, round=body.closing.round + 1)]
            case Reveal():
                events = [self._verdict(contribution) for contribution in body.contributions]
            case TakeSnapshot():
                path = self._scratch.new("snapshot")
                held = self.participant.save_public(path)
                events = [_stored(self.key, body.round, self._scratch, path, held)]
            case _:
                events = []  # abandoned work was done at once; phases are the coordinator's
        return [(now_ms, event) for event in events]

    def _catch_up(self, body: CatchUp) -> list[Event]:
        if body.snapshot is not None:
            path = self._scratch.path(body.snapshot.blob)
            self._participant = self._stage.participant(path, body.snapshot.round, body.snapshot.held)
        events = [event for closed in body.closed for event in self._close(closed)]
        return [*events, Ready(client=self.key, round=body.round)]

    def _work(self, work: Work, now_ms: int) -> list[Happening]:
        assignment = work.assignment
        takes_ms = min(assignment.steps * MS_PER_STEP, max(0, work.terms.deadline_ms - now_ms) // 2)
        path = self._scratch.new("update")
        try:
            claims = self.participant.work(assignment, work.terms, path)
        except (UpdateError, WorkerError) as error:  # diverged, for one
            failed = WorkFailed(client=self.key, assignment=assignment.id, reason=str(error))
            return [(now_ms + takes_ms, failed)]
        commit = hashlib.sha256(assignment.id.encode()).hexdigest()
        contribution = Contribution(
            assignment=assignment.id,
            round=assignment.round,
            client=self.key,
            commit=commit,
            update=self._scratch.keep(path),
            claims=replace(claims, work_ms=takes_ms),
        )
        committed = Committed(
            client=self.key, round=assignment.round, assignment=assignment.id, commit=commit
        )
        return [(now_ms + takes_ms, committed), (now_ms + takes_ms, Contributed(contribution=contribution))]

    def _close(self, closed: Closed) -> list[Event]:
        paths = [self._scratch.path(ref) for ref in closed.payloads]
        held = self.participant.close_with(closed, paths)
        number = closed.closing.round
        if self._stage.plan.topology == "mesh":
            report = Fingerprinted(
                client=self.key, round=number, fingerprint=held.public, outer_fingerprint=held.outer
            )
            return [report]
        assert closed.held in (None, held), f"round {number}: public is not the aggregator's"
        return []

    def _verdict(self, contribution: Contribution) -> Verdict:
        assert contribution.update is not None
        assert contribution.claims is not None
        reason = ""
        try:
            self.participant.check(self._scratch.path(contribution.update), contribution.claims.norm)
        except UpdateError as error:
            reason = str(error)
        return _verdict(self.key, contribution.round, contribution.assignment, reason)


class SimulatedAggregator:
    """The aggregator of a star, around the one that a networked run has.

    `public_at`: the fingerprint that the coordinator knows of public after so many closings.
    """

    def __init__(
        self,
        stage: Stage,
        scratch: Scratch,
        directory: Path,
        public_at: Callable[[int], Fingerprint | None],
    ) -> None:
        self._scratch, self._public_at = scratch, public_at
        self._aggregation = Aggregation(stage.plan, stage.parameters, directory, stage.first_snapshot)

    def receive(self, body: Body, now_ms: int) -> list[Happening]:
        match body:
            case Merge():
                event: Event = self._merge(body)
            case Advance():
                path = self._scratch.new("change")
                self._aggregation.move_on(body.closing.round, self._public_at(body.closing.round))
                fingerprint = self._aggregation.advance(body.closing, path)
                change = self._scratch.keep(path)
                event = Advanced(round=body.closing.round, change=change, fingerprint=fingerprint)
            case TakeSnapshot():
                path = self._scratch.new("snapshot")
                self._aggregation.move_on(body.round, self._public_at(body.round))
                held = Held(self._aggregation.snapshot(path))
                event = _stored(AGGREGATOR, body.round, self._scratch, path, held)
            case _:
                raise AssertionError(f"{body.kind} is not for the aggregator")
        return [(now_ms, event)]

    def _merge(self, body: Merge) -> Verdict:
        self._aggregation.move_on(body.round, self._public_at(body.round))
        reason, norm = "", None
        try:
            norm = self._aggregation.merge(
                body.assignment,
                self._scratch.path(body.update),
                round_number=body.round,
                weight=body.weight,
                norm=body.norm,
            )
        except UpdateError as error:
            reason = str(error)
        return replace(_verdict(AGGREGATOR, body.round, body.assignment, reason), norm=norm)


class SimulatedEvaluator:
    """`losses`: validation loss by how many closings the snapshot had seen."""

    def __init__(self, stage: Stage, scratch: Scratch) -> None:
        self._stage, self._scratch = stage, scratch
        self.losses: dict[int, float] = {}

    def receive(self, body: Body, now_ms: int) -> list[Happening]:
        assert isinstance(body, Evaluate), f"{body.kind} is not for the evaluator"
        number = body.snapshot.round
        result = self._stage.evaluate(self._scratch.path(body.snapshot.blob))
        self.losses[number] = result.loss
        events: Sequence[Event] = (
            Evaluated(round=number, loss=result.loss, samples=result.samples, metrics=dict(result.metrics)),
            *([Checkpointed(round=number, path="")] if body.checkpoint else []),
        )
        return [(now_ms, event) for event in events]


def _verdict(by: str, number: int, assignment: str, reason: str) -> Verdict:
    return Verdict(by=by, round=number, assignment=assignment, accepted=not reason, reason=reason)


def _stored(by: str, number: int, scratch: Scratch, path: Path, held: Held) -> SnapshotStored:
    snapshot = Snapshot(
        round=number, blob=scratch.keep(path), fingerprint=held.public, outer_fingerprint=held.outer
    )
    return SnapshotStored(by=by, snapshot=snapshot)
