"""A run in one process: the coordinator's `tick` around a queue of events in virtual time.

The coordinator, the participants and the aggregator are the ones that a networked run uses; what is left out is the
network, the processes and the disk's guarantees. The clock moves only from one event to the next, so a simulation
gives the same result each time.
"""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from manyhands.coordination.effects import Effect
from manyhands.coordination.events import Advanced, ClockPassed, Contributed, Event, Joined, SnapshotStored
from manyhands.coordination.machine import Tick, initial_state, next_deadline, tick
from manyhands.coordination.newcomers import fingerprint_at
from manyhands.coordination.records import Record
from manyhands.coordination.snapshots import kept_blobs
from manyhands.coordination.state import Round, RunState
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, EVERYONE, BlobRef, Contribution, Snapshot
from manyhands.errors import ManyhandsError, PlanError
from manyhands.plan.compatibility import check
from manyhands.plan.schema import Plan
from manyhands.simulation.actors import Happening, SimulatedAggregator, SimulatedClient, SimulatedEvaluator
from manyhands.simulation.scratch import Scratch
from manyhands.simulation.stage import Stage

START_MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundResult:
    """Of one closed round. `loss`: mean training loss of the counted contributions."""

    round: int
    counted: int
    loss: float | None
    fingerprint: str | None  # of public afterwards; None: it was never agreed on
    update_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What came of a simulation.

    `evaluations`: validation loss by the number of closings; `weights`: public at the end; `records`: the log that
    a server would have written.
    """

    rounds: tuple[RoundResult, ...]
    evaluations: dict[int, float]
    weights: dict[str, torch.Tensor]
    state: RunState
    records: tuple[Record, ...]

    @property
    def first_loss(self) -> float:
        """Validation loss before the first round."""
        return self.evaluations[min(self.evaluations)]

    @property
    def last_loss(self) -> float:
        """Validation loss after the last round."""
        return self.evaluations[max(self.evaluations)]

    @property
    def fingerprints(self) -> tuple[str | None, ...]:
        """Of public after each round."""
        return tuple(result.fingerprint for result in self.rounds)


def run(
    plan: Plan,
    clients: int,
    *,
    device: str = "cpu",
    allowed_tasks: Sequence[str] = (),
    on_round: Callable[[RoundResult], None] | None = None,
) -> Simulated:
    """See `simulation.simulate`."""
    check(plan)
    keys = client_keys(plan, clients)
    with tempfile.TemporaryDirectory(prefix="manyhands-simulation-") as scratch:
        stage = Stage.prepare(plan, Path(scratch) / "materials", device=device, allowed_tasks=allowed_tasks)
        return World(stage, keys, Path(scratch), on_round).run()


def client_keys(plan: Plan, number: int) -> tuple[str, ...]:
    """Keys of so many clients, from the allow-list where there is one. Raises PlanError where they may not be."""
    membership = plan.membership
    low, high = membership.min_clients, membership.max_clients
    if not low <= number <= high:
        raise PlanError(
            f"{number} clients cannot carry out this plan, which takes {low} to {high} "
            "(membership.min_clients, max_clients): simulate with another number, or change the plan"
        )
    if membership.kind == "open":
        return tuple(hashlib.sha256(f"simulated client {n}".encode()).hexdigest() for n in range(number))
    if number > len(membership.allow):
        raise PlanError(
            f"{number} clients, but membership.allow has {len(membership.allow)} keys: simulate with at most so many"
        )
    return membership.allow[:number]


class World:
    """Participants, aggregator and coordinator of one simulated run, around one queue of events.

    `scratch` is an empty directory, or one that holds nothing of the names used here.
    """

    def __init__(
        self,
        stage: Stage,
        keys: Sequence[str],
        scratch: Path,
        on_round: Callable[[RoundResult], None] | None = None,
    ) -> None:
        plan = stage.plan
        payloads = scratch / "payloads"
        payloads.mkdir()
        self._files = Scratch(payloads)
        first = Snapshot(
            round=0, blob=self._files.lend(stage.first_snapshot), fingerprint=stage.first_fingerprint
        )
        self.state = initial_state(plan.run_id or plan.name, plan, stage.samples, first)
        self._clients = {key: SimulatedClient(key, stage, self._files) for key in keys}
        self._evaluator = SimulatedEvaluator(stage, self._files)
        self._aggregator: SimulatedAggregator | None = None
        if plan.topology == "star":
            place = scratch / "aggregator"
            self._aggregator = SimulatedAggregator(
                stage, self._files, place, lambda closings: fingerprint_at(self.state, closings)
            )
        self._on_round = on_round
        self._queue: list[tuple[int, int, Event]] = []  # due, order of arrival, what
        self._arrived = 0
        self._now_ms = START_MS
        self._records: list[Record] = []
        self._rounds: list[RoundResult] = []
        self._told = 0  # of these, those that on_round has heard of

    def run(self) -> Simulated:
        """Until the run is over. Raises ManyhandsError when it fails or cannot go on."""
        for number, key in enumerate(self._clients):
            joined = Joined(client=key, boot="0" * 16, label=f"client {number}")
            self._expect([(self._now_ms, joined)])
        while self.state.phase not in ("finished", "failed"):
            self._take(self._next_event())
        if self.state.phase == "failed":
            raise ManyhandsError(f"the simulated run has failed: {self.state.reason}")
        anyone = next(iter(self._clients.values())).participant
        return Simulated(
            rounds=tuple(self._rounds),
            evaluations=self._evaluator.losses,
            weights={name: tensor.clone() for name, tensor in anyone.public.weights.items()},
            state=self.state,
            records=tuple(self._records),
        )

    # ------------------------------------------------------------------ events
    def _expect(self, happenings: Iterable[Happening]) -> None:
        for due_ms, event in happenings:
            self._arrived += 1
            heapq.heappush(self._queue, (due_ms, self._arrived, event))

    def _next_event(self) -> Event:
        """The next one, and the clock with it; where nothing is expected any more, the next deadline."""
        if self._queue:
            due_ms, _, event = heapq.heappop(self._queue)
        else:
            deadline = None if self.state.phase in ("waiting", "paused") else next_deadline(self.state)
            if deadline is None:
                raise ManyhandsError(
                    f"the simulated run stands still after {self.state.closed_rounds} rounds; it is "
                    f"{self.state.phase}: {self.state.reason}"
                )
            due_ms, event = deadline, ClockPassed()
        self._now_ms = max(self._now_ms, due_ms)
        return event

    def _take(self, event: Event) -> None:
        seed = len(self._records)
        result = tick(self.state, [event], self._now_ms, seed)
        self.state = result.state
        self._records.append(
            Record(sequence=self.state.sequence, now_ms=self._now_ms, seed=seed, event=event)
        )
        for numbered in result.effects:
            self._carry_out(numbered.effect)
        self._note(result)

    # ------------------------------------------------------------------ effects
    def _carry_out(self, effect: Effect) -> None:
        if effect.to == AGGREGATOR:
            assert self._aggregator is not None
            self._expect(self._aggregator.receive(effect.body, self._now_ms))
        elif effect.to == EVALUATOR:
            self._expect(self._evaluator.receive(effect.body, self._now_ms))
        else:
            for key in self._clients if effect.to == EVERYONE else [effect.to]:
                self._expect(self._clients[key].receive(effect.body, self._now_ms))

    def _note(self, result: Tick) -> None:
        """Results of the rounds that have closed, their fingerprints as soon as they are agreed; old files go."""
        self._rounds += [_result(round_) for round_ in result.closed]
        agreed = {closed.closing.round: closed.fingerprint for closed in self.state.history}
        while self._told < len(self._rounds):
            waiting = self._rounds[self._told]
            fingerprint = agreed.get(waiting.round)
            if fingerprint is None:
                break
            self._rounds[self._told] = replace(waiting, fingerprint=fingerprint)
            self._told += 1
            if self._on_round is not None:
                self._on_round(self._rounds[self._told - 1])
        if result.closed:
            self._files.keep_only(self._needed())

    def _needed(self) -> set[str]:
        """What somebody may still read: nobody a star's merged updates, since all clients are there already."""
        needed = set(kept_blobs(self.state))
        if self._aggregator is not None:
            for closed in self.state.history:
                needed -= {counted.update.blob for counted in closed.closing.counted}
        return needed | {ref.blob for _, _, event in self._queue for ref in _named(event)}


def _named(event: Event) -> tuple[BlobRef, ...]:
    """The payloads that an event brings, which the state does not know before it is taken."""
    match event:
        case Contributed(contribution=Contribution(update=BlobRef() as update)):
            return (update,)
        case Advanced():
            return (event.change,)
        case SnapshotStored():
            return (event.snapshot.blob,)
    return ()


def _result(round_: Round) -> RoundResult:
    entries = [round_.entries[identifier].contribution for identifier in round_.agreed]
    claims = [entry.claims for entry in entries if entry is not None and entry.claims is not None]
    losses = [claim.loss for claim in claims if claim.loss is not None]
    updates = [entry.update for entry in entries if entry is not None and entry.update is not None]
    return RoundResult(
        round=round_.number,
        counted=len(round_.agreed),
        loss=sum(losses) / len(losses) if losses else None,
        fingerprint=None,
        update_bytes=sum(update.size_bytes for update in updates),
    )
