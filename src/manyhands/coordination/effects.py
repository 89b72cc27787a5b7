"""What follows from an event: bodies, and to whom they go.

Effects are delivered at least once, in order, under the id (sequence number of the event, position in its effects);
who receives one twice does nothing the second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator

from manyhands.coordination.types import (
    Assignment,
    AssignmentId,
    BlobRef,
    ClientId,
    Closing,
    Contribution,
    Fingerprint,
    Held,
    RoundTerms,
    Snapshot,
)


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
