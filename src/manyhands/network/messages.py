"""What goes over a client's WebSocket: small, typed, versioned JSON messages.

A connection starts with the sign-in (Hello, Challenge, Proof, Welcome; see sign_in.py). After it the client sends
intents and heartbeats, the server deliveries and acknowledgements. Invariants:
- an intent is acknowledged only after its event is durable; a client repeats what was not acknowledged, under the
  same id, after each reconnect; repeating one that was carried out changes nothing;
- deliveries carry the id (sequence, n) of an effect and come in that order; the client names the last one it has
  handled when it connects again.
Nothing here is larger than MAX_MESSAGE_BYTES from a client: payloads are blobs.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from manyhands.config import Settings
from manyhands.coordination.types import (
    BlobRef,
    Body,
    Committed,
    Contributed,
    Fingerprinted,
    Left,
    Ready,
    SnapshotStored,
    Verdict,
    WorkFailed,
)
from manyhands.errors import ProtocolError
from manyhands.plan.schema import ClientKey, Identifier

PROTOCOL_VERSIONS: Final = (1,)
"""Versions that this program speaks, best last."""

MAX_MESSAGE_BYTES: Final = 256 * 1024
"""Largest message that a server takes from a client."""
MAX_DELIVERY_BYTES: Final = 16 * 1024 * 1024
"""Largest message that a client takes from its server: a CatchUp holds the closings since a snapshot."""

CLOSING_DOMAIN: Final = "manyhands closing v1"
"""Of the server's signature under a closing."""

Nonce = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Signature = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
EffectId = tuple[int, int]
"""(sequence of the event, position among its effects)"""


# ---------------------------------------------------------------- sign-in
class Hello(Settings):
    """First word of a client. `seen`: the last delivery handled by this boot, to go on after it."""

    type: Literal["hello"] = "hello"
    versions: Annotated[tuple[int, ...], Field(min_length=1, max_length=16)]
    run_id: Identifier
    client: ClientKey
    nonce: Nonce
    boot: Annotated[str, Field(pattern=r"^[0-9a-f]{16,64}$")]
    label: Annotated[str, Field(max_length=64)] = ""
    seen: EffectId | None = None
    has_round: Annotated[int, Field(ge=0)] | None = None
    plan_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """The plan that this client has approved or worked on before; another one is refused."""


class Challenge(Settings):
    type: Literal["challenge"] = "challenge"
    version: int
    server: ClientKey
    nonce: Nonce
    signature: Signature
    """The server's, over the transcript."""


class Proof(Settings):
    type: Literal["proof"] = "proof"
    signature: Signature
    """The client's, over the same transcript."""


class Welcome(Settings):
    """The client is in. `token` opens the blob routes for this session; `heartbeat_s` is how often to speak."""

    type: Literal["welcome"] = "welcome"
    token: str
    descriptor: str
    """The run descriptor as JSON text, exactly as it was signed."""
    signature: Signature
    heartbeat_s: float
    resumed: bool
    """True: deliveries go on after `seen`; False: a CatchUp follows."""


class Rejected(Settings):
    """The server says no. `final`: trying again as you are will not help."""

    type: Literal["rejected"] = "rejected"
    reason: str
    final: bool
    retry_after_s: float = 2.0


# ---------------------------------------------------------------- afterwards
class Opening(Settings):
    """Opens a commit to the server, which then takes that blob, of that size, from this client."""

    kind: Literal["opening"] = "opening"
    assignment: str
    round: int
    update: BlobRef
    nonce: Nonce


class SnapshotOffer(Settings):
    """A client that was asked for a snapshot (mesh) says which blob it will upload."""

    kind: Literal["snapshot_offer"] = "snapshot_offer"
    round: int
    blob: BlobRef


IntentBody = Annotated[
    Ready
    | Committed
    | Opening
    | Contributed
    | WorkFailed
    | Verdict
    | Fingerprinted
    | SnapshotOffer
    | SnapshotStored
    | Left,
    Field(discriminator="kind"),
]


class Intent(Settings):
    type: Literal["intent"] = "intent"
    id: Annotated[str, Field(pattern=r"^[0-9a-z-]{1,64}$")]
    body: IntentBody


class Progress(Settings):
    """For the live tables; believed by nobody, stored nowhere."""

    round: int | None = None
    activity: Annotated[str, Field(max_length=32)] = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens_per_s: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0


class Heartbeat(Settings):
    type: Literal["heartbeat"] = "heartbeat"
    progress: Progress = Progress()


class Deliver(Settings):
    type: Literal["deliver"] = "deliver"
    id: EffectId
    body: Body
    signature: str = ""
    """The server's signature of a closing; empty for other bodies."""


class Ack(Settings):
    """`error`: the intent was refused for good; it is not to be repeated."""

    type: Literal["ack"] = "ack"
    id: str
    error: str | None = None


class Goodbye(Settings):
    """The server ends the connection. Not final: come back."""

    type: Literal["goodbye"] = "goodbye"
    reason: str
    final: bool


FromClient = Annotated[Hello | Proof | Intent | Heartbeat, Field(discriminator="type")]
FromServer = Annotated[Challenge | Welcome | Rejected | Deliver | Ack | Goodbye, Field(discriminator="type")]
_from_client: TypeAdapter[Hello | Proof | Intent | Heartbeat] = TypeAdapter(FromClient)
_from_server: TypeAdapter[Challenge | Welcome | Rejected | Deliver | Ack | Goodbye] = TypeAdapter(FromServer)


def encode(message: Settings) -> str:
    return message.model_dump_json()


def from_client(text: str) -> Hello | Proof | Intent | Heartbeat:
    """Parse what a client sent. Raises ProtocolError."""
    _check_size(text, MAX_MESSAGE_BYTES)
    try:
        return _from_client.validate_json(text)
    except ValidationError as error:
        raise ProtocolError(f"message from a client: {_first_fault(error)}") from None


def from_server(text: str) -> Challenge | Welcome | Rejected | Deliver | Ack | Goodbye:
    """Parse what the server sent. Raises ProtocolError."""
    _check_size(text, MAX_DELIVERY_BYTES)
    try:
        return _from_server.validate_json(text)
    except ValidationError as error:
        raise ProtocolError(
            f"message from the server: {_first_fault(error)}. Do client and server have the same version?"
        ) from None


def _check_size(text: str, limit: int) -> None:
    """Before any parser sees the text. Nesting is bounded by the parser itself (pydantic's: 200 levels)."""
    if len(text) > limit:
        raise ProtocolError(f"a message of {len(text)} characters; at most {limit} are accepted")


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}"
