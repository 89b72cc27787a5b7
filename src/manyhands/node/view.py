"""What a server shows of its runs, and a client of itself: the JSON that every view reads.

`GET /api/runs` is a list of RunSummary, `GET /api/runs/{run_id}` a RunView, and each server-sent event of
`GET /api/runs/{run_id}/changes` a RunView whose `rounds` and `incidents` are the new ones alone. Of a long run a view
has the newest rounds and incidents (node/server/account.py says how many); the ledger has all. The live
table, the dashboard, `manyhands ledger` and `manyhands demo` read these and nothing else; nobody parses
printed text.

Unknown fields are ignored, so that an older view reads a newer server. Times are integer milliseconds of the
server's clock, losses are nats per token (or the task's own unit), sizes are bytes. A loss that is not finite
is shown as None, since JSON has no word for it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from manyhands.errors import ProtocolError


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


MaybeLoss = Annotated[float | None, BeforeValidator(_finite)]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @classmethod
    def parse(cls, data: Any) -> Self:
        """From JSON; raises ProtocolError where the answer is something else."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the answer"
            raise ProtocolError(
                f"the server's account of a run does not fit: '{where}' {first['msg'].lower()}. "
                "Server and client are of different versions: install the same manyhands on both."
            ) from None


class ClientView(_View):
    """One key that has taken part, as the coordinator knows it, with the latest figures that it claimed."""

    key: str
    label: str = ""
    status: str  # catching_up, ready, left, lost, kicked
    suspected: bool = False
    round: int | None = None
    counted: int = 0
    uncounted: int = 0
    rejoined: int = 0
    loss: MaybeLoss = None
    tokens_per_s: float | None = None
    bytes_up: int | None = None  # as far as this start of the server has heard
    bytes_down: int | None = None
    last_heard_ms: int | None = None


class CountedView(_View):
    client: str
    loss: MaybeLoss = None
    weight: int = 1


class UncountedView(_View):
    client: str
    reason: str


class RoundView(_View):
    """A closed round. In `counted` the order of merging."""

    round: int
    closed_ms: int
    duration_ms: int
    mean_loss: MaybeLoss = None
    tokens: int = 0
    counted: tuple[CountedView, ...] = ()
    uncounted: tuple[UncountedView, ...] = ()
    fingerprint: str | None = None


class IncidentView(_View):
    """Something that happened to a client: joined, rejoined, suspected, recovered, lost, left, kicked, ..."""

    ms: int
    client: str
    what: str
    round: int | None = None
    detail: str = ""

    @property
    def text(self) -> str:
        return f"{self.what}: {self.detail}" if self.detail else self.what


class EvaluationView(_View):
    """`round`: so many closings had the snapshot seen; 0 is the first weights."""

    round: int
    loss: MaybeLoss


class RunSummary(_View):
    run_id: str
    name: str
    phase: str
    reason: str = ""
    closed_rounds: int
    total_rounds: int
    topology: str
    preset: str | None = None
    live_clients: int = 0
    mean_loss: MaybeLoss = None
    started_ms: int
    now_ms: int


class RunView(_View):
    run_id: str
    name: str
    phase: str
    reason: str = ""
    closed_rounds: int
    total_rounds: int
    topology: str
    preset: str | None = None
    clients: tuple[ClientView, ...] = ()
    rounds: tuple[RoundView, ...] = ()
    incidents: tuple[IncidentView, ...] = ()
    evaluations: tuple[EvaluationView, ...] = ()
    checkpoint: str | None = None
    loss_unit: str = ""
    """Of training and validation loss; empty where nothing is known of the task's."""
    started_ms: int
    now_ms: int

    def summary(self) -> RunSummary:
        last = self.rounds[-1].mean_loss if self.rounds else None
        shared = {
            name: getattr(self, name) for name in RunSummary.model_fields if name in type(self).model_fields
        }
        return RunSummary(
            **shared,
            live_clients=sum(is_live(client) for client in self.clients),
            mean_loss=last,
        )

    def since(self, first_round: int, first_incident: int) -> RunView:
        """The same without the rounds before `first_round` and the first `first_incident` incidents."""
        return self.model_copy(
            update={
                "rounds": tuple(r for r in self.rounds if r.round >= first_round),
                "incidents": self.incidents[first_incident:],
            }
        )


def is_live(client: ClientView) -> bool:
    """The coordinator counts on it: it is there, or catching up."""
    return client.status in ("ready", "catching_up")


class ClientEvent(TypedDict, total=False):
    """What a client program tells its own views (`on_event`). Each carries what it knows; the latest counts.

    `kind` is one word; `text` a line for people; `state` what the client is doing now.
    """

    v: int
    ms: int
    kind: (
        str  # connected, disconnected, joined, phase, work, progress, sent, closed, dismissed, finished, ...
    )
    level: Literal["info", "warning", "error"]
    text: str
    state: str  # connecting, catching up, waiting, working, uploading, applying, finished, ...
    phase: str
    run_id: str
    client: str
    label: str
    round: int
    total_rounds: int
    steps_done: int
    steps: int
    step: int  # of the run, with `tensors`
    tensors: dict[str, dict[str, float]]  # optimizer_stats: norms, by parameter and of what
    loss: float | None
    tokens_per_s: float | None
    unit: str | None  # of what these tokens are, as the task names them
    bytes_up: int
    bytes_down: int
    counted: int
    uncounted: int
