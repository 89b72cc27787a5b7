"""The values of coordination: what its events and effects speak of, and what is stored of them.

Everything here and in `events.py` and `effects.py` is a frozen dataclass of plain values, so that it can be stored as
JSON, replayed and compared. Times are integer milliseconds of the server's clock; a client, a blob and a fingerprint
are hex strings. Participants that are not clients have names of their own: AGGREGATOR, EVALUATOR; EVERYONE is all
clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

ClientId = str
BlobId = str
AssignmentId = str
Fingerprint = str

AGGREGATOR: Final = "aggregator"
EVALUATOR: Final = "evaluator"
EVERYONE: Final = "everyone"


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
