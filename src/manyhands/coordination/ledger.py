"""What happened in each round, to whom, and why: read from the run's log by doing it again.

`account` folds `tick` over the records and keeps what the state forgets: closed rounds with all their entries, who
went when and came back when, phases, evaluations. `recorded_rounds` is the part that a replay of the training
needs: terms, every assignment with what its client said of its start, and the closing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from manyhands.coordination.effects import Closed, PhaseChanged
from manyhands.coordination.events import Checkpointed, Evaluated
from manyhands.coordination.machine import Tick, tick
from manyhands.coordination.presence import is_live
from manyhands.coordination.records import Record
from manyhands.coordination.state import Client, Entry, Round, RunState
from manyhands.coordination.types import (
    EVERYONE,
    Assignment,
    AssignmentId,
    BlobRef,
    Claims,
    ClientId,
    Closing,
    Contribution,
    Fingerprint,
    RoundTerms,
    Snapshot,
)

IncidentKind = Literal["joined", "rejoined", "suspected", "recovered", "lost", "left", "kicked", "resynced"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkAccount:
    """One assignment's way through its round."""

    assignment: Assignment
    counted: bool
    reason: str  # why not counted
    contribution: Contribution | None  # opened: with update and claims
    assigned_ms: int
    opened_ms: int | None
    position: int | None  # in the order of merging, from 0
    factor: float | None
    witnesses: tuple[str, ...]  # mesh
    objections: tuple[str, ...]

    @property
    def duration_ms(self) -> int | None:
        """From the assignment to the stored update."""
        return None if self.opened_ms is None else self.opened_ms - self.assigned_ms

    @property
    def claims(self) -> Claims | None:
        return None if self.contribution is None else self.contribution.claims


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundAccount:
    number: int
    opened_ms: int
    terms: RoundTerms
    closing: Closing
    published_ms: int
    change: BlobRef | None  # star
    fingerprint: Fingerprint | None  # of public afterwards; mesh: None while it was never agreed
    works: tuple[WorkAccount, ...]  # in the order in which they were given out


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Something that happened to a client, while `round` was the next to close."""

    at_ms: int
    round: int
    client: ClientId
    kind: IncidentKind
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Absence:
    """From when a client went until something of it was merged again. None: not yet."""

    client: ClientId
    how: Literal["lost", "left", "kicked", "restarted"]  # restarted: back before it was missed
    gone_ms: int  # when it was suspected, if it was, else when it was gone
    gone_round: int
    given_back: tuple[AssignmentId, ...]  # what it had not sent
    rejoined_ms: int | None = None
    rejoined_round: int | None = None  # the next to close when it came back
    merged_round: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationAccount:
    round: int  # closings that the snapshot has seen
    at_ms: int
    loss: float | None
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseAccount:
    at_ms: int
    phase: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunAccount:
    """All of a run. `open_round`: the works of one that is not closed yet."""

    state: RunState
    rounds: tuple[RoundAccount, ...]
    open_rounds: tuple[Round, ...]
    incidents: tuple[Incident, ...]
    absences: tuple[Absence, ...]
    evaluations: tuple[EvaluationAccount, ...]
    snapshots: tuple[Snapshot, ...]  # all that were accepted
    checkpoints: tuple[Checkpointed, ...]
    phases: tuple[PhaseAccount, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedWork:
    """What a replay does again. `claims` None: nothing was sent, so nothing of it is known or needed."""

    assignment: Assignment
    claims: Claims | None  # with `start` and `threads`
    update: BlobRef | None
    counted: bool  # how the client settled it: dropped from pending, or restored


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRound:
    terms: RoundTerms
    works: tuple[RecordedWork, ...]
    closing: Closing
    fingerprint: Fingerprint | None


def account(initial: RunState, records: Iterable[Record]) -> RunAccount:
    """Everything that the log says, from `initial_state` and all records of the run, in order."""
    book = Ledger(initial)
    for record in records:
        book.add(record)
    return book.finished()


def recorded_rounds(initial: RunState, records: Iterable[Record]) -> tuple[RecordedRound, ...]:
    """The closed rounds of a log, oldest first, for `simulate(plan, ledger=...)`."""
    return tuple(recorded(round_) for round_ in account(initial, records).rounds)


def recorded(round_: RoundAccount) -> RecordedRound:
    works = tuple(
        RecordedWork(
            assignment=work.assignment,
            claims=work.claims,
            update=None if work.contribution is None else work.contribution.update,
            counted=work.counted,
        )
        for work in round_.works
    )
    return RecordedRound(
        terms=round_.terms, works=works, closing=round_.closing, fingerprint=round_.fingerprint
    )


@dataclass(slots=True)
class Ledger:
    """The fold: the state so far, and what has been noted on the way. A server adds each record as it comes."""

    state: RunState
    rounds: list[RoundAccount] = field(default_factory=list)
    incidents: list[Incident] = field(default_factory=list)
    absences: list[Absence] = field(default_factory=list)
    evaluations: list[EvaluationAccount] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    checkpoints: list[Checkpointed] = field(default_factory=list)
    phases: list[PhaseAccount] = field(default_factory=list)
    fingerprints: dict[int, Fingerprint] = field(default_factory=dict)
    suspected_ms: dict[ClientId, int] = field(default_factory=dict)
    ordinal_at_return: dict[int, int] = field(default_factory=dict)  # by position in `absences`

    def __post_init__(self) -> None:
        if not self.snapshots:
            self.snapshots = list(self.state.snapshots)

    def add(self, record: Record) -> None:
        before = self.state
        done = tick(before, (record.event,), record.now_ms, record.seed)
        self.state = done.state
        now_ms = done.state.now_ms
        effects = [numbered.effect for numbered in done.effects]
        self._note_clients(before, done)
        published = [effect.body for effect in effects if isinstance(effect.body, Closed)]
        for round_, closed in zip(done.closed, published, strict=True):
            self._note_round(round_, closed, now_ms)
        if done.state.history is not before.history:
            for past in done.state.history:
                if past.fingerprint is not None:
                    self.fingerprints[past.closing.round] = past.fingerprint
        if done.state.snapshots[-1] != self.snapshots[-1]:
            self.snapshots.append(done.state.snapshots[-1])
        event = record.event
        if isinstance(event, Evaluated) and done.state.evaluations is not before.evaluations:
            self.evaluations.append(
                EvaluationAccount(
                    round=event.round,
                    at_ms=now_ms,
                    loss=event.loss,
                    samples=event.samples,
                    metrics=event.metrics,
                )
            )
        elif isinstance(event, Checkpointed) and done.state.checkpointed != before.checkpointed:
            self.checkpoints.append(event)
        for effect in effects:
            if isinstance(effect.body, PhaseChanged) and effect.to == EVERYONE:
                phase, reason = effect.body.phase, effect.body.reason
                self.phases.append(PhaseAccount(at_ms=now_ms, phase=phase, reason=reason))

    def forget(self, before: int) -> None:
        """Drop what was noted of rounds before this one, for who keeps a ledger for months; the state stays."""
        self.rounds = [round_ for round_ in self.rounds if round_.number >= before]
        since_ms = self.rounds[0].opened_ms if self.rounds else self.state.now_ms
        self.incidents = [incident for incident in self.incidents if incident.round >= before]
        self.evaluations = [evaluation for evaluation in self.evaluations if evaluation.round >= before]
        self.phases = [phase for phase in self.phases if phase.at_ms >= since_ms]
        self.snapshots = [s for s in self.snapshots if s.round >= before] or self.snapshots[-1:]
        self.checkpoints = [c for c in self.checkpoints if c.round >= before] or self.checkpoints[-1:]
        self.fingerprints = {number: f for number, f in self.fingerprints.items() if number >= before}
        kept = [at for at, a in enumerate(self.absences) if a.rejoined_ms is None or a.gone_round >= before]
        returns = self.ordinal_at_return
        self.ordinal_at_return = {now: returns[at] for now, at in enumerate(kept) if at in returns}
        self.absences = [self.absences[at] for at in kept]

    def finished(self) -> RunAccount:
        return RunAccount(
            state=self.state,
            rounds=tuple(_with_fingerprint(r, self.fingerprints.get(r.number)) for r in self.rounds),
            open_rounds=tuple(self.state.rounds.values()),
            incidents=tuple(self.incidents),
            absences=tuple(self.absences),
            evaluations=tuple(self.evaluations),
            snapshots=tuple(self.snapshots),
            checkpoints=tuple(self.checkpoints),
            phases=tuple(self.phases),
        )

    # ------------------------------------------------------------------------------------- clients
    def _note_clients(self, before: RunState, done: Tick) -> None:
        """What the event changed in clients, and which of their work it freed."""
        for key, client in done.state.clients.items():
            was = before.clients.get(key)
            if was is client:
                continue
            freed = _freed(before, done, key)
            for kind in _what_happened(was, client):
                detail = (
                    f"given back: {', '.join(freed)}" if freed and kind not in ("joined", "recovered") else ""
                )
                at_ms, number = done.state.now_ms, before.closed_rounds
                self.incidents.append(
                    Incident(at_ms=at_ms, round=number, client=key, kind=kind, detail=detail)
                )
                if kind == "suspected":
                    self.suspected_ms[key] = at_ms
                elif kind == "recovered":
                    self.suspected_ms.pop(key, None)
                elif kind in ("lost", "left", "kicked"):
                    self._gone(key, kind, at_ms, number, freed)
                elif kind == "rejoined":
                    self._back(key, at_ms, number, freed)

    def _gone(
        self,
        key: ClientId,
        how: Literal["lost", "left", "kicked", "restarted"],
        at_ms: int,
        number: int,
        freed: tuple[AssignmentId, ...],
    ) -> None:
        gone_ms = self.suspected_ms.pop(key, at_ms)
        self.absences.append(
            Absence(client=key, how=how, gone_ms=gone_ms, gone_round=number, given_back=freed)
        )

    def _back(self, key: ClientId, at_ms: int, number: int, freed: tuple[AssignmentId, ...]) -> None:
        open_ = [a for a in self.absences if a.client == key and a.rejoined_ms is None]
        if not open_:
            self._gone(key, "restarted", at_ms, number, freed)
        latest = max(at for at, absence in enumerate(self.absences) if absence.client == key)
        self.absences[latest] = replace(self.absences[latest], rejoined_ms=at_ms, rejoined_round=number)
        self.ordinal_at_return[latest] = self.state.next_ordinal

    # -------------------------------------------------------------------------------------- rounds
    def _note_round(self, round_: Round, closed: Closed, now_ms: int) -> None:
        self.rounds.append(
            RoundAccount(
                number=round_.number,
                opened_ms=round_.opened_ms,
                terms=round_.terms,
                closing=closed.closing,
                published_ms=now_ms,
                change=closed.change,
                fingerprint=closed.fingerprint,
                works=tuple(_work(round_, entry) for entry in round_.entries.values()),
            )
        )
        merged = {
            entry.assignment.client: int(entry.assignment.id.rpartition("-")[2])
            for entry in round_.entries.values()
            if entry.status == "agreed"
        }
        for at, absence in enumerate(self.absences):
            since = self.ordinal_at_return.get(at)
            if since is None or absence.merged_round is not None:
                continue
            if merged.get(absence.client, -1) >= since:
                self.absences[at] = replace(absence, merged_round=round_.number)


def _what_happened(was: Client | None, now: Client) -> list[IncidentKind]:
    if was is None:
        return ["kicked"] if now.status == "kicked" else ["joined"]
    kinds: list[IncidentKind] = []
    if now.status != was.status and now.status in ("lost", "left", "kicked"):
        kinds.append(now.status)
    if now.rejoined > was.rejoined:
        kinds.append("rejoined")
    elif is_live(now) and now.suspected != was.suspected:
        kinds.append("suspected" if now.suspected else "recovered")
    if now.resynced > was.resynced:
        kinds.append("resynced")
    return kinds


def _freed(before: RunState, done: Tick, client: ClientId) -> tuple[AssignmentId, ...]:
    """What of a client's work this event gave back because the client went."""
    after = {**done.state.rounds, **{round_.number: round_ for round_ in done.closed}}
    return tuple(
        identifier
        for number, round_ in before.rounds.items()
        for identifier, entry in round_.entries.items()
        if entry.assignment.client == client
        and entry.status != "given_back"
        and after[number].entries[identifier].lost
    )


def _work(round_: Round, entry: Entry) -> WorkAccount:
    counted = entry.status == "agreed"
    identifier = entry.assignment.id
    factors = {c.assignment: c.factor for c in round_.closing.counted} if round_.closing else {}
    opened = entry.contribution is not None and entry.contribution.update is not None
    return WorkAccount(
        assignment=entry.assignment,
        counted=counted,
        reason=entry.reason,
        contribution=entry.contribution if opened else None,
        assigned_ms=entry.assigned_ms,
        opened_ms=entry.opened_ms,
        position=round_.agreed.index(identifier) if counted else None,
        factor=factors.get(identifier),
        witnesses=tuple(sorted(entry.witnesses)),
        objections=tuple(sorted(entry.objections)),
    )


def _with_fingerprint(round_: RoundAccount, fingerprint: Fingerprint | None) -> RoundAccount:
    return round_ if fingerprint is None else replace(round_, fingerprint=fingerprint)
