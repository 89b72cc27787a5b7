"""The state of a run, as `tick` keeps it. Immutable: a tick makes a new one.

Rounds are numbered from 0. `public` after n closings is "public at n": the first weights are public at 0, and the
closing of round r makes public at r + 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from manyhands.coordination.effects import Closed
from manyhands.coordination.types import (
    Assignment,
    AssignmentId,
    ClientId,
    Closing,
    Contribution,
    Held,
    IndexRange,
    RoundTerms,
    Snapshot,
)
from manyhands.plan.schema import Plan

Phase = Literal["waiting", "warming_up", "training", "checkpointing", "finished", "paused", "failed"]
Stage = Literal["work", "agree", "close"]
"""Of a round. Secure aggregation will add its own before and between."""

ClientStatus = Literal["catching_up", "ready", "left", "lost", "kicked"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """A key that has taken part. `boot` names the process that speaks for it now."""

    key: ClientId
    boot: str
    label: str
    status: ClientStatus
    suspected: bool = False
    round: int | None = None  # its public has seen so many closings, as far as it has said
    joined_ms: int = 0
    step_us: int | None = None  # measured time of one optimizer step, from counted contributions
    counted: int = 0
    uncounted: int = 0
    rejoined: int = 0
    resynced: int = 0  # its public differed from the agreed one, so often
    resynced_at: int = 0  # closings that public had seen then: who differs before that again is let be


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One assignment's way through a round."""

    assignment: Assignment
    status: Literal["assigned", "committed", "opened", "agreed", "refused", "given_back"]
    assigned_ms: int
    contribution: Contribution | None = None
    witnesses: frozenset[str] = frozenset()  # mesh: who has it and found it sound, the server as "server"
    objections: frozenset[str] = frozenset()
    revealed: bool = False
    opened_ms: int | None = None
    reason: str = ""  # why refused or given back
    lost: bool = False  # given back because its client went: that client may work again in this round


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    number: int
    stage: Stage
    terms: RoundTerms
    opened_ms: int
    entries: dict[AssignmentId, Entry]
    agreed: tuple[AssignmentId, ...] = ()  # in the order of agreement: the order of merging
    commits_closed: bool = False  # mesh
    closing: Closing | None = None  # set once, then immutable
    deadline_ms: int = 0  # the one in force: terms.deadline_ms, moved by downtime, by the agreement of a mesh
    extended: bool = False  # moved once already, for an update that waits for its verdict
    interrupted: bool = False  # the server was down meanwhile: its durations measure nothing
    witnesses: tuple[ClientId, ...] = ()  # mesh: whose verdicts count, fixed when commits close


@dataclass(frozen=True, slots=True, kw_only=True)
class DataLedger:
    """Where every sample of the open epoch is. free + assigned + pending + counted = total, at every step.

    assigned: work under way; pending: sent, not yet settled by a closing. Ranges are sorted and disjoint.
    """

    total: int
    epoch: int = 0
    free: tuple[IndexRange, ...] = ()
    assigned: dict[AssignmentId, tuple[IndexRange, ...]] = field(default_factory=dict)
    pending: dict[AssignmentId, tuple[IndexRange, ...]] = field(default_factory=dict)
    counted: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    run_id: str
    plan: Plan
    phase: Phase
    reason: str = ""  # why paused or failed
    resume_to: Phase | None = None  # paused: where to go on
    sequence: int = 0  # of the last event applied
    now_ms: int = 0
    phase_deadline_ms: int | None = None  # warming up
    clients: dict[ClientId, Client] = field(default_factory=dict)
    rounds: dict[int, Round] = field(default_factory=dict)  # open ones, oldest first; lag + 1 at most
    next_round: int = 0  # to be opened
    closed_rounds: int = 0  # closings published: public is at this
    next_ordinal: int = 0  # of the next assignment
    outer_steps: int = 0  # closings with something counted: Adam's t
    inner_steps: int = 0  # of the schedule
    failed_in_a_row: int = 0
    round_ms: tuple[int, ...] = ()  # durations of the latest counted contributions, for deadlines
    last_timeout_ms: int | None = None
    data: DataLedger
    history: tuple[Closed, ...] = ()  # since the oldest snapshot that newcomers may start from
    reported: dict[int, dict[ClientId, Held]] = field(default_factory=dict)  # mesh, latest rounds
    snapshots: tuple[Snapshot, ...]  # oldest first; the first one is public at 0
    snapshot_asked: tuple[int, str, int] | None = None  # round, whom ("": nobody to ask yet), when
    evaluations: dict[int, float | None] = field(default_factory=dict)  # infinity: not finite; None: no model
    older_data: tuple[DataLedger, ...] = ()  # earlier epochs that are not all counted yet, oldest first
    boundary_ms: int = 0  # when the latest closing was published
    opening_ms: int | None = (
        None  # when the next round opens at the latest, now that enough clients are ready
    )
    snapshots_taken: int = 0  # accepted so far, the first one included
    to_evaluate: dict[int, bool] = field(default_factory=dict)  # round of a snapshot: checkpoint it too?
    checkpointed: int | None = None  # round of the latest checkpoint
    snapshot_offered: Snapshot | None = None  # mesh: stored before its fingerprint was agreed
