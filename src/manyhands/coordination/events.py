"""What happens in a run. An event is appended to its log before any effect of it leaves (effects.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Discriminator

from manyhands.coordination.types import (
    AssignmentId,
    BlobRef,
    ClientId,
    Contribution,
    Fingerprint,
    Held,
    Snapshot,
)


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
