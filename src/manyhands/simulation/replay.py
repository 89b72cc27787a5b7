"""`simulate(plan, ledger=...)`: a networked run again, from its record, to the same bits.

All work that was sent is done anew, each from the local state that its client named as its start, with the seed of
its assignment and the threads that were claimed; the recorded closings merge it. Equal fingerprints after every
round then show that nothing but the plan, the data and the ledger went into the model. (Local work is only
repeatable on the same kind of machine; the path from updates to public is exact everywhere.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from manyhands.coordination.ledger import RecordedRound, RecordedWork
from manyhands.errors import ManyhandsError
from manyhands.simulation.recorded import RecordedRun
from manyhands.simulation.stage import Stage
from manyhands.updates import functions
from manyhands.updates.aggregation import Aggregation
from manyhands.updates.participant import Participant
from manyhands.updates.types import Local


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
    """`equal`: every round's fingerprint is the recorded one."""

    rounds: tuple[ReplayedRound, ...]

    @property
    def equal(self) -> bool:
        return bool(self.rounds) and all(round_.equal for round_ in self.rounds)

    @property
    def first_difference(self) -> ReplayedRound | None:
        return next((round_ for round_ in self.rounds if not round_.equal), None)


def replay(
    run: RecordedRun, *, device: str = "cpu", on_round: Callable[[ReplayedRound], None] = lambda _: None
) -> Replayed:
    """Do all recorded work again and compare fingerprints. Raises ManyhandsError where the record has gaps."""
    threads = torch.get_num_threads()
    try:
        with tempfile.TemporaryDirectory(prefix="manyhands-replay-") as scratch:
            stage = Stage.open(run, Path(scratch) / "materials", device=device)
            return _Replay(run, stage, Path(scratch), on_round).all_rounds()
    finally:
        torch.set_num_threads(threads)


@dataclass(eq=False, slots=True)
class _Replay:
    """One participant does everybody's work in turn; `locals` holds each client's states by what made them."""

    run: RecordedRun
    stage: Stage
    scratch: Path
    on_round: Callable[[ReplayedRound], None]
    participant: Participant = field(init=False)
    aggregation: Aggregation | None = None
    locals: dict[str, dict[str, Local]] = field(default_factory=dict)

    def all_rounds(self) -> Replayed:
        self.participant = self.stage.participant(self.run.first_snapshot)
        if self.stage.plan.topology == "star":
            place = self.scratch / "aggregator"
            self.aggregation = Aggregation(
                self.stage.plan, self.stage.parameters, place, self.run.first_snapshot
            )
        started_from = {w.claims.start for r in self.run.rounds for w in r.works if w.claims is not None}
        done = []
        for recorded in self.run.rounds:
            done.append(self._round(recorded, started_from))
            self.on_round(done[-1])
        return Replayed(rounds=tuple(done))

    def _round(self, recorded: RecordedRound, started_from: set[str]) -> ReplayedRound:
        paths: dict[str, Path] = {}
        for work in recorded.works:
            # Work that was never sent matters where its client has gone on from it.
            if work.claims is not None or work.assignment.id in started_from:
                paths[work.assignment.id] = self._work(work, recorded)
        fingerprint = self._close(recorded, paths)
        for path in paths.values():
            path.unlink()
        return ReplayedRound(
            round=recorded.closing.round, recorded=recorded.fingerprint, replayed=fingerprint
        )

    def _work(self, work: RecordedWork, recorded: RecordedRound) -> Path:
        assignment = work.assignment
        states = self.locals.setdefault(assignment.client, {})
        start = work.claims.start if work.claims is not None else next(reversed(states), "fresh")
        if start != "fresh" and start not in states:
            raise ManyhandsError(
                f"assignment {assignment.id} started from local state '{start}', which the record does not make"
            )
        if work.claims is not None and work.claims.threads:
            torch.set_num_threads(work.claims.threads)
        self.participant.local = states.get(start, Local())
        path = self.scratch / f"{assignment.id}.safetensors"
        self.participant.work(assignment, recorded.terms, path)
        states[assignment.id] = self.participant.local
        kept = self.stage.plan.rounds.save_local_every + 2
        for old in list(states)[:-kept]:
            del states[old]
        return path

    def _close(self, recorded: RecordedRound, paths: dict[str, Path]) -> str:
        closing = recorded.closing
        updates = [paths[counted.assignment] for counted in closing.counted]
        self.participant.local = Local()
        if self.aggregation is None or not closing.counted:
            fingerprint = self.participant.close(closing, update_paths=updates)
        else:
            works = {work.assignment.id: work for work in recorded.works}
            for counted, path in zip(closing.counted, updates, strict=True):
                claims = works[counted.assignment].claims
                self.aggregation.merge(
                    counted.assignment,
                    path,
                    round_number=closing.round,
                    weight=counted.weight,
                    norm=claims.norm if claims is not None else None,
                    factor=counted.factor,
                )
            change = self.scratch / f"change-{closing.round}.safetensors"
            self.aggregation.advance(closing, change)
            fingerprint = self.participant.close(closing, change_path=change)
            change.unlink()
        for states in self.locals.values():
            for after, local in states.items():
                states[after] = functions.adopt(
                    self.participant.public, local, closing, plan=self.stage.plan
                )
        return fingerprint
