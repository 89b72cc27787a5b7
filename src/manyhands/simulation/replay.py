"""`simulate(ledger=...)`: a networked run again, from its record, to the same bits.

All work that was sent is done anew, each from the local state that its client named as its start, with the seed of
its assignment, and the threads and micro-batches that were claimed; the recorded closings merge it. Equal
fingerprints after every round then show that nothing but the plan, the data and the ledger went into the model.
(Local work is only repeatable on the same kind of machine; the path from updates to public is exact everywhere.)
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from manyhands.coordination.ledger import RecordedRound, RecordedWork
from manyhands.errors import ManyhandsError, UpdateError, WorkerError
from manyhands.simulation.recorded import RecordedRun
from manyhands.simulation.stage import Stage
from manyhands.updates import functions
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.types import Local

FRESH = "fresh"


class RecordGap(ManyhandsError):
    """The record lacks something without which a round cannot be done again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedRound:
    round: int
    recorded: str | None  # fingerprint; None: never agreed on
    replayed: str

    @property
    def equal(self) -> bool:
        return self.recorded == self.replayed


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """`equal`: every round's fingerprint is the recorded one, and there is a round."""

    rounds: tuple[ReplayedRound, ...]

    @property
    def equal(self) -> bool:
        return bool(self.rounds) and all(round_.equal for round_ in self.rounds)

    @property
    def first_difference(self) -> ReplayedRound | None:
        return next((round_ for round_ in self.rounds if not round_.equal), None)


def replay(
    run: RecordedRun,
    *,
    device: str = "cpu",
    allowed_tasks: Sequence[str] = (),
    on_round: Callable[[ReplayedRound], None] | None = None,
) -> Replayed:
    """Do all recorded work again and compare fingerprints. Raises ManyhandsError where the record has gaps."""
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="manyhands-replay-") as directory:
            scratch = Path(directory)
            stage = Stage.open(run, scratch / "materials", device=device, allowed_tasks=allowed_tasks)
            replaying = _Replay(run, stage, scratch)
            done = []
            for recorded in run.rounds:
                done.append(replaying.round(recorded))
                if on_round is not None:
                    on_round(done[-1])
            return Replayed(rounds=tuple(done))
    finally:
        torch.set_num_threads(threads)


class _LocalStates:
    """Every client's local states by the assignment that made them, as long as the record still needs them.

    Needed is a state from which recorded work starts later; and the latest one of each client, since work that was
    never sent does not say from what it started.
    """

    def __init__(self, rounds: Sequence[RecordedRound]) -> None:
        works = [work for recorded in rounds for work in recorded.works]
        self._starts = Counter(work.claims.start for work in works if work.claims is not None)
        self._states: dict[str, dict[str, Local]] = {}

    def wanted(self, assignment: str) -> bool:
        """Whether somebody goes on from the state that this assignment made."""
        return self._starts[assignment] > 0

    def before(self, work: RecordedWork) -> Local:
        """The state from which this work started."""
        states = self._states.setdefault(work.assignment.client, {})
        if work.claims is None:
            return states[next(reversed(states))] if states else Local()
        start = work.claims.start
        self._starts[start] -= 1
        if start == FRESH:
            return Local()
        if start not in states:
            raise RecordGap(
                f"assignment {work.assignment.id} started from local state '{start}', which the record does not make"
            )
        return states[start]

    def add(self, work: RecordedWork, made: Local) -> None:
        states = self._states[work.assignment.client]
        states[work.assignment.id] = made
        for name in list(states)[:-1]:
            if not self.wanted(name):
                del states[name]

    def settle(self, adopt: Callable[[Local], Local]) -> None:
        """A round has closed."""
        for states in self._states.values():
            for name, local in states.items():
                states[name] = adopt(local)


class _Replay:
    """One participant does everybody's work in turn, and applies the closings."""

    def __init__(self, run: RecordedRun, stage: Stage, scratch: Path) -> None:
        self._stage, self._scratch = stage, scratch
        self._participant = stage.participant(run.first_snapshot)
        self._fingerprint = self._participant.held().public
        self._locals = _LocalStates(run.rounds)
        self._aggregation: Aggregation | None = None
        if stage.plan.topology == "star":
            place = scratch / "aggregator"
            self._aggregation = Aggregation(stage.plan, stage.parameters, place, run.first_snapshot)

    def round(self, recorded: RecordedRound) -> ReplayedRound:
        paths: dict[str, Path] = {}
        for work in recorded.works:
            if work.claims is not None or self._locals.wanted(work.assignment.id):
                self._work(work, recorded, paths)
        closing = recorded.closing
        missing = [c.assignment for c in closing.counted if c.assignment not in paths]
        if missing:
            raise RecordGap(f"round {closing.round} counted {missing[0]}, of which nothing is recorded")
        fingerprint = self._close(recorded, paths)
        for path in paths.values():
            path.unlink()
        self._fingerprint = fingerprint
        return ReplayedRound(round=closing.round, recorded=recorded.fingerprint, replayed=fingerprint)

    def _work(self, work: RecordedWork, recorded: RecordedRound, paths: dict[str, Path]) -> None:
        """Into `paths`; unless it fails without having counted: what a client said of that may be made up."""
        assignment = work.assignment
        path = self._scratch / f"{assignment.id}.safetensors"
        if work.claims is not None and work.claims.threads:
            torch.set_num_threads(work.claims.threads)
        self._stage.trainer.micro_batch_size = (
            None if work.claims is None else work.claims.micro_batch or None
        )
        try:
            _check_alone(work)
            self._participant.local = self._locals.before(work)
            self._participant.work(assignment, recorded.terms, path)
        except (UpdateError, WorkerError, RecordGap):
            if work.counted:
                raise
            return
        self._locals.add(work, self._participant.local)
        paths[assignment.id] = path

    def _close(self, recorded: RecordedRound, paths: dict[str, Path]) -> str:
        closing = recorded.closing
        updates = [paths[counted.assignment] for counted in closing.counted]
        self._participant.local = Local()
        if self._aggregation is None or not closing.counted:
            held = self._participant.close(closing, update_paths=updates)
        else:
            change = self._advance(recorded, updates)
            held = self._participant.close(closing, change_path=change)
            change.unlink()
        public, plan = self._participant.public, self._stage.plan
        self._locals.settle(lambda local: functions.adopt(public, local, closing, plan=plan))
        return held.public

    def _advance(self, recorded: RecordedRound, updates: Sequence[Path]) -> Path:
        """As the aggregator did; the file of the change."""
        assert self._aggregation is not None
        closing = recorded.closing
        self._aggregation.move_on(closing.round, self._fingerprint)
        claims = {work.assignment.id: work.claims for work in recorded.works}
        for counted, path in zip(closing.counted, updates, strict=True):
            claimed = claims[counted.assignment]
            self._aggregation.merge(
                counted.assignment,
                path,
                round_number=closing.round,
                weight=counted.weight,
                norm=None if claimed is None else claimed.norm,
                factor=counted.factor,
            )
        change = self._scratch / f"change-{closing.round}.safetensors"
        self._aggregation.advance(closing, change)
        return change


def _check_alone(work: RecordedWork) -> None:
    """Sums over several processes have other last bits than those of one, and a replay is one."""
    claims = work.claims
    if claims is not None and (claims.data_parallelism, claims.tensor_parallelism) != (1, 1):
        raise RecordGap(
            f"assignment {work.assignment.id} was done by several processes together (data_parallelism "
            f"{claims.data_parallelism}, tensor_parallelism {claims.tensor_parallelism}): one process cannot do it "
            "again to the same bits"
        )
