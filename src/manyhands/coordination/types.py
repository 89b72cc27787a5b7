"""The words of coordination: what happens (events), what follows (effects), and what is said to whom (bodies).

Everything here is a frozen dataclass of plain values, so that it can be stored as JSON, replayed and compared.
Times are integer milliseconds of the server's clock; a client, a blob and a fingerprint are hex strings.
Participants that are not clients have names of their own: AGGREGATOR, EVALUATOR; EVERYONE is all clients.

An event is appended to the run's log before any effect of it leaves. Effects are delivered at least once, in
order, under the id (sequence number of the event, position in its effects); who receives one twice does nothing
the second time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import Discriminator

ClientId = str
BlobId = str
AssignmentId = str
Fingerprint = str

AGGREGATOR: Final = "aggregator"
EVALUATOR: Final = "evaluator"
EVERYONE: Final = "everyone"


# ------------------------------------------------------------------------------------------- values
class Held(NamedTuple):
    """What somebody holds after some closings, by fingerprint.

    `outer`: of the outer optimizer's state, in a mesh, where everybody holds it alike; None in a star, and as long as
    there is none.
    """

    public: Fingerprint
    outer: Fingerprint | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRange:
    """Positions [start, stop) of epoch `epoch`'s permutation of the samples (data/permutation.py)."""

    epoch: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A payload by content: the id is the hash of its manifest, which names size and chunks."""

    blob: BlobId
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """A piece of work for one client in one round. `id` is `<round>-<ordinal>`, never used twice in a run."""

    id: AssignmentId
    round: int
    client: ClientId
    steps: int
    batch_size: int
    ranges: tuple[IndexRange, ...]  # steps * batch_size samples in all; empty where data is local
    weight: int  # of the contribution in the merge; from the assignment, never from the client
    seed: int  # of the global RNG before the work, 0 <= seed < 2**63


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterTerms:
    """One step of the outer optimizer, computed once by the coordinator.

    bias1 and bias2 are Adam's 1 - beta^t, or 1.0 where corrections are off.
    """

    lr: float
    bias1: float = 1.0
    bias2: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTerms:
    """What all the work of a round has in common. Published with the round."""

    round: int
    fragment: int
    first_step: int  # inner steps of the schedule before this round
    learning_rates: tuple[
        float, ...
    ]  # one for each of plan.local.steps; a shorter assignment uses the first ones
    outer: OuterTerms
    deadline_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a client says of its update: for tables, for the deadline, for checks. Nothing is weighted by it."""

    norm: float  # global L2 norm of the decoded main channel, checked to 1e-3
    loss: float | None = None  # mean training loss, nats per token or the task's own
    tokens: int = 0
    samples: int = 0
    work_ms: int = 0
    start: str = "fresh"  # local state at the start: "fresh", or the assignment id after which it was
    threads: int = 0  # torch threads of the work, for replay
    micro_batch: int = 0  # samples of a forward pass, for replay; 0: all of a step at once
    data_parallelism: int = 1  # replicas that shared each step's samples, for replay
    tensor_parallelism: int = 1  # processes that shared each replica, for replay
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A signed claim: this client, this round, this update. `commit` covers the rest (identity/)."""

    assignment: AssignmentId
    round: int
    client: ClientId
    commit: str
    update: BlobRef | None = None  # None until it is opened
    nonce: str = ""
    claims: Claims | None = None
    signature: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A contribution in a closing, in the order in which it is merged."""

    assignment: AssignmentId
    client: ClientId
    update: BlobRef
    weight: int
    factor: float = 1.0  # clip factor, 0 < factor <= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Uncounted:
    assignment: AssignmentId
    client: ClientId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """The end of a round: immutable, signed when published. Empty `counted`: public does not change."""

    round: int
    fragment: int
    counted: tuple[Counted, ...]
    uncounted: tuple[Uncounted, ...]
    outer: OuterTerms
    closed_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """`public` (in a mesh also `outer`) after `round` closings (0: the first weights)."""

    round: int
    blob: BlobRef
    fingerprint: Fingerprint
    outer_fingerprint: Fingerprint | None = None

    @property
    def held(self) -> Held:
        return Held(self.fingerprint, self.outer_fingerprint)


# ------------------------------------------------------------------------------------------- events
# Each is a fact that has happened. Unknown, late, repeated or reordered ones change nothing (invariant 4).
@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStarted:
    """The server (re)started after `downtime_ms`: deadlines move by it, everybody gets a full heartbeat window."""

    downtime_ms: int
    kind: Literal["server_started"] = "server_started"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockPassed:
    """A deadline named by `next_deadline` has passed."""

    kind: Literal["clock_passed"] = "clock_passed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A client signed in and was admitted. A new boot supersedes the closed or suspected session of its key.

    `has_round`: how many closings the public it holds has seen, None for nothing.
    """

    client: ClientId
    boot: str
    label: str = ""
    has_round: int | None = None
    kind: Literal["joined"] = "joined"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A client holds `public` after `round` closings and can work."""

    client: ClientId
    round: int
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspected:
    client: ClientId
    kind: Literal["suspected"] = "suspected"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    """A suspected client was heard again."""

    client: ClientId
    kind: Literal["recovered"] = "recovered"


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """A client is gone: `lost` (no heartbeat), `left` (said so), `kicked` (by the operator; may not come back)."""

    client: ClientId
    how: Literal["lost", "left", "kicked"]
    reason: str = ""
    kind: Literal["left"] = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    client: ClientId
    round: int
    assignment: AssignmentId
    commit: str
    kind: Literal["committed"] = "committed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributed:
    """The update is on the server's disk, and opening and signature fit the commit (checked by the shell)."""

    contribution: Contribution
    kind: Literal["contributed"] = "contributed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkFailed:
    """A client could not do an assignment; its range is given back at once."""

    client: ClientId
    assignment: AssignmentId
    reason: str
    kind: Literal["work_failed"] = "work_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A check of an opened update by `by`: the aggregator in a star (accepted: merged and counted), a witness in a
    mesh (accepted: has it, and it is sound)."""

    by: str
    round: int
    assignment: AssignmentId
    accepted: bool
    reason: str = ""
    norm: float | None = None
    kind: Literal["verdict"] = "verdict"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advanced:
    """The aggregator applied a closing: outer and public are durable, the encoded change is a blob (star)."""

    round: int
    change: BlobRef
    fingerprint: Fingerprint
    kind: Literal["advanced"] = "advanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprinted:
    """A client's public, in a mesh also its outer, after `round + 1` closings: the closing of `round` is applied."""

    client: ClientId
    round: int
    fingerprint: Fingerprint
    outer_fingerprint: Fingerprint | None = None
    kind: Literal["fingerprinted"] = "fingerprinted"

    @property
    def held(self) -> Held:
        return Held(self.fingerprint, self.outer_fingerprint)


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotStored:
    """By the aggregator, or in a mesh by the client that was asked; the fingerprint must be the agreed one."""

    by: str
    snapshot: Snapshot
    kind: Literal["snapshot_stored"] = "snapshot_stored"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The evaluator's result for the snapshot after `round` closings; a task without a model has no loss."""

    round: int
    loss: float | None
    samples: int
    metrics: dict[str, float] = field(default_factory=dict)
    kind: Literal["evaluated"] = "evaluated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """What a person keeps was written, from the snapshot after `round` closings."""

    round: int
    path: str
    kind: Literal["checkpointed"] = "checkpointed"


@dataclass(frozen=True, slots=True, kw_only=True)
class PauseAsked:
    reason: str
    kind: Literal["pause_asked"] = "pause_asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeAsked:
    kind: Literal["resume_asked"] = "resume_asked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Something without which the run cannot go on has failed for good."""

    reason: str
    kind: Literal["failed"] = "failed"


Event = Annotated[
    ServerStarted
    | ClockPassed
    | Joined
    | Ready
    | Suspected
    | Recovered
    | Left
    | Committed
    | Contributed
    | WorkFailed
    | Verdict
    | Advanced
    | Fingerprinted
    | SnapshotStored
    | Evaluated
    | Checkpointed
    | PauseAsked
    | ResumeAsked
    | Failed,
    Discriminator("kind"),
]


# ------------------------------------------------------------------------------------------- effects
@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """A closing and what came of it. In a star `change` is what to apply (None: nothing counted)."""

    closing: Closing
    change: BlobRef | None
    fingerprint: Fingerprint | None  # star: of public afterwards; mesh: not known yet
    outer_fingerprint: Fingerprint | None = None  # mesh, known together with the other
    kind: Literal["closed"] = "closed"

    @property
    def held(self) -> Held | None:
        """By whoever has applied it; None: not agreed yet."""
        return None if self.fingerprint is None else Held(self.fingerprint, self.outer_fingerprint)

    @property
    def payloads(self) -> tuple[BlobRef, ...]:
        """The blobs that applying it takes: the change (star), or the counted updates in their order (mesh)."""
        if self.change is not None:
            return (self.change,)
        return tuple(counted.update for counted in self.closing.counted)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatchUp:
    """To a client that joined: start from `snapshot` (None: what it holds will do), apply `closed`, say Ready.

    `earlier`: the closings before the snapshot that are still remembered; they settle what the client had sent.
    """

    snapshot: Snapshot | None
    closed: tuple[Closed, ...]
    round: int  # closings that public has seen when done
    earlier: tuple[Closing, ...] = ()
    kind: Literal["catch_up"] = "catch_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    assignment: Assignment
    terms: RoundTerms
    kind: Literal["work"] = "work"


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """Work that will not be counted any more; a client stops it between two micro-batches."""

    round: int
    assignment: AssignmentId
    reason: str
    kind: Literal["abandon"] = "abandon"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reveal:
    """Mesh: these opened contributions may be fetched now; each client answers with a Verdict for each."""

    round: int
    contributions: tuple[Contribution, ...]
    kind: Literal["reveal"] = "reveal"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """Star, to the aggregator: check this update and, if it is sound, add it to the round's sum."""

    round: int
    assignment: AssignmentId
    client: ClientId
    update: BlobRef
    weight: int
    norm: float  # as claimed
    kind: Literal["merge"] = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """Star, to the aggregator: the round is over; `closing.counted` are the ones it has accepted."""

    closing: Closing
    kind: Literal["advance"] = "advance"


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeSnapshot:
    """To the aggregator (star) or one client (mesh): store public after `round` closings as a blob."""

    round: int
    kind: Literal["take_snapshot"] = "take_snapshot"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate:
    """To the evaluator; `checkpoint`: also write what a person keeps."""

    snapshot: Snapshot
    checkpoint: bool
    kind: Literal["evaluate"] = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged:
    phase: str
    reason: str
    kind: Literal["phase_changed"] = "phase_changed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dismissed:
    """To a client whose session ends: superseded, kicked or lost."""

    reason: str
    final: bool  # True: do not come back
    kind: Literal["dismissed"] = "dismissed"


Body = Annotated[
    Closed
    | CatchUp
    | Work
    | Abandon
    | Reveal
    | Merge
    | Advance
    | TakeSnapshot
    | Evaluate
    | PhaseChanged
    | Dismissed,
    Discriminator("kind"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """`to` is a client, EVERYONE (clients), AGGREGATOR or EVALUATOR."""

    to: str
    body: Body
