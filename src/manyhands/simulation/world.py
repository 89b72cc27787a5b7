"""`simulate(plan, clients)`: a run in one process.

The coordinator's `tick`, the participants and the aggregator are the ones that a networked run uses; what is left
out is the network, the processes and the disk's guarantees. Time is virtual: it moves with the work that clients
claim, so that deadlines behave, and a simulation of one seed gives the same result each time.
"""

from __future__ import annotations

import collections
import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from manyhands.coordination.machine import initial_state, next_deadline, tick
from manyhands.coordination.records import Record
from manyhands.coordination.state import RunState
from manyhands.coordination.types import (
    AGGREGATOR,
    EVALUATOR,
    EVERYONE,
    Advance,
    Advanced,
    BlobRef,
    CatchUp,
    Checkpointed,
    ClockPassed,
    Closed,
    Committed,
    Contributed,
    Contribution,
    Effect,
    Evaluate,
    Evaluated,
    Event,
    Fingerprinted,
    Joined,
    Merge,
    Ready,
    Reveal,
    Snapshot,
    SnapshotStored,
    TakeSnapshot,
    Verdict,
    Work,
)
from manyhands.errors import ManyhandsError, UpdateError
from manyhands.network.blobs.manifest import manifest_of
from manyhands.plan.schema import Plan
from manyhands.simulation.stage import Stage, close
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.participant import Participant

START_MS = 1_000_000
MOST_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """Of one closed round. `loss`: mean training loss of the counted contributions."""

    round: int
    counted: int
    loss: float | None
    fingerprint: str
    update_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came of a simulation. `evaluations`: validation loss by round; `weights`: public at the end."""

    rounds: tuple[RoundResult, ...]
    evaluations: dict[int, float]
    weights: dict[str, torch.Tensor]
    state: RunState
    records: tuple[Record, ...]

    @property
    def first_loss(self) -> float:
        return self.evaluations[min(self.evaluations)]

    @property
    def last_loss(self) -> float:
        return self.evaluations[max(self.evaluations)]


def simulate(
    plan: Plan,
    clients: int = 3,
    *,
    directory: Path | None = None,
    device: str = "cpu",
    on_round: Callable[[RoundResult], None] = lambda _: None,
) -> Simulated:
    """Carry out `plan` with `clients` simulated clients, one after the other on this machine.

    `directory` keeps the prepared data, so that several simulations of one task prepare it once. Raises DataError,
    PlanError, or ManyhandsError when the run cannot finish (too few clients for the plan's membership).
    """
    with tempfile.TemporaryDirectory(prefix="manyhands-simulation-") as scratch:
        stage = Stage.prepare(plan, directory or Path(scratch) / "run", device=device)
        return _World(stage, clients, Path(scratch), on_round).run()


@dataclass(eq=False, slots=True)
class _World:
    """Participants, aggregator and coordinator around one queue of events."""

    stage: Stage
    number: int
    scratch: Path
    on_round: Callable[[RoundResult], None]
    blobs: dict[str, Path] = field(default_factory=dict)
    participants: dict[str, Participant] = field(default_factory=dict)
    events: collections.deque[Event] = field(default_factory=collections.deque)
    records: list[Record] = field(default_factory=list)
    rounds: list[RoundResult] = field(default_factory=list)
    evaluations: dict[int, float] = field(default_factory=dict)
    now_ms: int = START_MS
    files: int = 0
    aggregation: Aggregation | None = None
    state: RunState = field(init=False)

    def run(self) -> Simulated:
        plan = self.stage.plan
        first = Snapshot(
            round=0, blob=self._keep(self.stage.first_snapshot), fingerprint=self.stage.first_fingerprint
        )
        self.state = initial_state(plan.run_id or plan.name, plan, self.stage.samples, first)
        if plan.topology == "star":
            place = self.scratch / "aggregator"
            place.mkdir()
            self.aggregation = Aggregation(plan, self.stage.parameters, place, self.stage.first_snapshot)
        for index in range(self.number):
            key = hashlib.sha256(f"simulated client {index}".encode()).hexdigest()
            self.events.append(Joined(client=key, boot="0" * 16, label=f"client {index}"))
        while self.state.phase not in ("finished", "failed"):
            self._step()
        if self.state.phase == "failed":
            raise ManyhandsError(f"the simulated run has failed: {self.state.reason}")
        return Simulated(
            rounds=tuple(self.rounds),
            evaluations=self.evaluations,
            weights=self._weights(),
            state=self.state,
            records=tuple(self.records),
        )

    def _weights(self) -> dict[str, torch.Tensor]:
        anyone = next(iter(self.participants.values()))
        return {name: tensor.clone() for name, tensor in anyone.public.weights.items()}

    def _step(self) -> None:
        if not self.events:
            deadline = next_deadline(self.state)
            if deadline is None or self.state.phase in ("waiting", "paused"):
                raise ManyhandsError(
                    f"the simulated run stands still: it is {self.state.phase} ({self.state.reason}); it has "
                    f"{self.number} clients, the plan wants {self.stage.plan.membership.min_clients}"
                )
            self.now_ms = max(self.now_ms, deadline)
            self.events.append(ClockPassed())
        event = self.events.popleft()
        self.now_ms += 1
        seed = len(self.records)
        result = tick(self.state, [event], self.now_ms, seed)
        self.state = result.state
        self.records.append(Record(sequence=self.state.sequence, now_ms=self.now_ms, seed=seed, event=event))
        if len(self.records) > MOST_EVENTS:
            raise ManyhandsError(f"the simulated run is not finished after {MOST_EVENTS} events")
        for numbered in result.effects:
            self._carry_out(numbered.effect)

    # ------------------------------------------------------------------ effects
    def _carry_out(self, effect: Effect) -> None:
        body: Any = effect.body
        if effect.to == AGGREGATOR:
            self._aggregator(body)
        elif effect.to == EVALUATOR:
            self._evaluator(body)
        else:
            keys = list(self.participants) if effect.to == EVERYONE else [effect.to]
            if isinstance(body, Closed):
                self._note(body)
            for key in keys:
                self._client(key, body)

    def _client(self, key: str, body: object) -> None:
        match body:
            case CatchUp():
                self._catch_up(key, body)
            case Work():
                self._work(key, body)
            case Closed():
                self._close(key, body)
                self.events.append(Ready(client=key, round=body.closing.round + 1))
            case Reveal():
                for contribution in body.contributions:
                    self._witness(key, contribution)
            case TakeSnapshot():
                path = self._new_file("snapshot")
                fingerprint = self.participants[key].save_public(path)
                snapshot = Snapshot(round=body.round, blob=self._keep(path), fingerprint=fingerprint)
                self.events.append(SnapshotStored(by=key, snapshot=snapshot))

    def _catch_up(self, key: str, body: CatchUp) -> None:
        if body.snapshot is not None:
            self.participants[key] = self.stage.participant(self.blobs[body.snapshot.blob.blob])
        for closed in body.closed:
            self._close(key, closed)
        self.events.append(Ready(client=key, round=body.round))

    def _work(self, key: str, work: Work) -> None:
        path = self._new_file("update")
        claims = self.participants[key].work(work.assignment, work.terms, path)
        self.now_ms += claims.work_ms
        contribution = Contribution(
            assignment=work.assignment.id,
            round=work.assignment.round,
            client=key,
            commit=hashlib.sha256(work.assignment.id.encode()).hexdigest(),
        )
        self.events.append(
            Committed(
                client=key,
                round=contribution.round,
                assignment=contribution.assignment,
                commit=contribution.commit,
            )
        )
        opened = replace(contribution, update=self._keep(path), claims=claims)
        self.events.append(Contributed(contribution=opened))

    def _close(self, key: str, closed: Closed) -> None:
        if closed.change is not None:
            paths: Sequence[Path] = [self.blobs[closed.change.blob]]
        else:
            paths = [self.blobs[c.update.blob] for c in closed.closing.counted]
        fingerprint = close(self.participants[key], closed, paths)
        if self.stage.plan.topology == "mesh":
            self.events.append(Fingerprinted(client=key, round=closed.closing.round, fingerprint=fingerprint))
        elif closed.fingerprint is not None and fingerprint != closed.fingerprint:
            raise AssertionError(
                f"round {closed.closing.round}: a client's public differs from the aggregator's"
            )

    def _witness(self, key: str, contribution: Contribution) -> None:
        assert contribution.update is not None
        assert contribution.claims is not None
        reason = ""
        try:
            self.participants[key].check(self.blobs[contribution.update.blob], contribution.claims.norm)
        except UpdateError as error:
            reason = str(error)
        self.events.append(
            Verdict(
                by=key,
                round=contribution.round,
                assignment=contribution.assignment,
                accepted=not reason,
                reason=reason,
            )
        )

    def _aggregator(self, body: object) -> None:
        assert self.aggregation is not None
        match body:
            case Merge():
                reason, norm = "", None
                try:
                    norm = self.aggregation.merge(
                        body.assignment,
                        self.blobs[body.update.blob],
                        round_number=body.round,
                        weight=body.weight,
                        norm=body.norm,
                    )
                except UpdateError as error:
                    reason = str(error)
                self.events.append(
                    Verdict(
                        by=AGGREGATOR,
                        round=body.round,
                        assignment=body.assignment,
                        accepted=not reason,
                        reason=reason,
                        norm=norm,
                    )
                )
            case Advance():
                path = self._new_file("change")
                fingerprint = self.aggregation.advance(body.closing, path)
                self.events.append(
                    Advanced(round=body.closing.round, change=self._keep(path), fingerprint=fingerprint)
                )
            case TakeSnapshot():
                path = self._new_file("snapshot")
                fingerprint = self.aggregation.snapshot(path)
                snapshot = Snapshot(round=body.round, blob=self._keep(path), fingerprint=fingerprint)
                self.events.append(SnapshotStored(by=AGGREGATOR, snapshot=snapshot))

    def _evaluator(self, body: object) -> None:
        assert isinstance(body, Evaluate)
        result = self.stage.evaluate(self.blobs[body.snapshot.blob.blob])
        self.evaluations[body.snapshot.round] = result.loss
        self.events.append(Evaluated(round=body.snapshot.round, loss=result.loss, samples=result.samples))
        if body.checkpoint:
            self.events.append(Checkpointed(round=body.snapshot.round, path=""))

    def _note(self, closed: Closed) -> None:
        """Remember a closed round, and drop the update files that nobody needs any more (star)."""
        counted = closed.closing.counted
        losses = [
            event.contribution.claims.loss
            for event in (record.event for record in self.records)
            if isinstance(event, Contributed)
            and event.contribution.round == closed.closing.round
            and event.contribution.claims is not None
            and event.contribution.claims.loss is not None
        ]
        result = RoundResult(
            round=closed.closing.round,
            counted=len(counted),
            loss=sum(losses) / len(losses) if losses else None,
            fingerprint=closed.fingerprint or "",
            update_bytes=sum(c.update.size_bytes for c in counted),
        )
        self.rounds.append(result)
        self.on_round(result)

    # ------------------------------------------------------------------ files
    def _new_file(self, kind: str) -> Path:
        self.files += 1
        return self.scratch / f"{kind}-{self.files}.safetensors"

    def _keep(self, path: Path) -> BlobRef:
        manifest = manifest_of(path)
        self.blobs[manifest.blob] = path
        return manifest.ref
