"""What goes over a client's WebSocket: small, typed, versioned JSON messages.

A connection starts with the sign-in (Hello, Challenge, Proof, Welcome; see sign_in.py). After it the client sends
intents and heartbeats, the server deliveries and acknowledgements. Invariants:
- an intent is acknowledged only after its event is durable; a client repeats what was not acknowledged, under the
  same id, after each reconnect; repeating one that was carried out changes nothing;
- deliveries carry the id (sequence, n) of an effect and come in that order; the client names the last one it has
  handled when it connects again.
Nothing here is larger than MAX_MESSAGE_BYTES from a client: payloads are blobs.

What a client sends is read strictly, since it goes into a log that everybody reads: exact types, no unknown keys,
finite numbers, whole numbers from 0 below 2^53, identifiers in their form, and no control characters in text that
ends up on somebody's terminal.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter, ValidationError

from manyhands.config import Settings
from manyhands.coordination.effects import Body, CatchUp, Closed
from manyhands.coordination.events import (
    Committed,
    Contributed,
    Fingerprinted,
    Left,
    Ready,
    SnapshotStored,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.types import BlobRef
from manyhands.errors import ProtocolError
from manyhands.plan.schema import ClientKey, Identifier

__all__ = [
    "MAX_DELIVERY_BYTES", "MAX_MESSAGE_BYTES", "MAX_REASON", "MAX_TEXT", "PROTOCOL_VERSIONS", "PUBLISHED_DOMAIN",
    "Ack", "Challenge", "Deliver", "EffectId", "Goodbye", "Heartbeat", "Hello", "Intent", "IntentBody", "Opening",
    "Progress", "Proof", "Rejected", "SnapshotOffer", "Welcome", "encode", "from_client", "from_server", "plain_text",
    "published",
]  # fmt: skip

PROTOCOL_VERSIONS: Final = (1,)
"""Versions that this program speaks, best last."""

MAX_MESSAGE_BYTES: Final = 256 * 1024
"""Largest message that a server takes from a client."""
MAX_DELIVERY_BYTES: Final = 16 * 1024 * 1024
"""Largest message that a client takes from its server: a CatchUp holds the closings since a snapshot."""

MAX_TEXT: Final = 4096
"""Longest text in a field of a client's message, in characters."""
MAX_REASON: Final = 500
"""Longest reason that a server takes, in characters."""

PUBLISHED_DOMAIN: Final = "manyhands published v1"
"""Of the server's signature under what changes public."""

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
    """The server says no. `final`: trying again as you are will not help; `finished`: there is nothing left to do."""

    type: Literal["rejected"] = "rejected"
    reason: str
    final: bool
    finished: bool = False
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
    """The server's, over `published`, of bodies that change public (Closed, CatchUp); empty for the others."""


def published(run_id: str, body: Closed | CatchUp) -> dict[str, Any]:
    """What the server signs of what changes public: all of it, for this run alone."""
    return {"run_id": run_id, "body": body}


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
        message = _from_client.validate_json(text, strict=True)
    except ValidationError as error:
        raise ProtocolError(f"message from a client: {_first_fault(error)}") from None
    _check_values(message, "", message.type)
    return message


def from_server(text: str) -> Challenge | Welcome | Rejected | Deliver | Ack | Goodbye:
    """Parse what the server sent. Raises ProtocolError."""
    _check_size(text, MAX_DELIVERY_BYTES)
    try:
        return _from_server.validate_json(text, strict=True)
    except ValidationError as error:
        raise ProtocolError(
            f"message from the server: {_first_fault(error)}. Do client and server have the same version?"
        ) from None


def plain_text(text: str, limit: int = MAX_TEXT) -> str:
    """Text as a message may carry it: without control characters, and at most `limit` characters of it."""
    return _CONTROL.sub(" ", text)[:limit]


def _check_size(text: str, limit: int) -> None:
    """Before any parser sees the text. Nesting is bounded by the parser itself (pydantic's: 200 levels)."""
    size = len(text) if len(text) > limit else len(text.encode("utf-8", "surrogatepass"))
    if size > limit:
        raise ProtocolError(f"a message of {size} bytes; at most {limit} are accepted")


def _first_fault(error: ValidationError) -> str:
    """In few words: keys and tags in it are the sender's, and may be anything."""
    fault = error.errors(include_url=False, include_input=False)[0]
    return plain_text(f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}", 300)


# ---------------------------------------------------------------- what types alone do not say
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""All but tab and newline; what turns the direction of text around; halves of characters."""
_HEX64: Final = re.compile(r"[0-9a-f]{64}")
_ASSIGNMENT: Final = re.compile(r"[0-9]{1,16}-[0-9]{1,16}")
_FORMS: Final[Mapping[str, tuple[re.Pattern[str], str]]] = {
    **dict.fromkeys(("client", "by", "blob", "commit"), (_HEX64, "64 hex digits")),
    "nonce": (re.compile(r"([0-9a-f]{64})?"), "64 hex digits"),
    "signature": (re.compile(r"([0-9a-f]{128})?"), "128 hex digits"),
    **dict.fromkeys(("fingerprint", "outer_fingerprint"), (re.compile(r"[0-9a-f]{1,128}"), "hex digits")),
    "assignment": (_ASSIGNMENT, "<round>-<ordinal>"),
    "start": (re.compile(rf"fresh|{_ASSIGNMENT.pattern}"), "'fresh' or an assignment"),
}
"""Of the text in fields of these names, wherever they stand."""
_LARGEST: Final[Mapping[str, int]] = {"threads": 4096}
"""Of the whole numbers in fields of these names; of all others it is 2^53 - 1."""


def _check_values(value: Any, name: str, where: str) -> None:
    """`name`: of the innermost field. The parser has seen to types and depth."""
    fault = ""
    if isinstance(value, str):
        form = _FORMS.get(name)
        if form is not None and not form[0].fullmatch(value):
            fault = f"{value[:80]!r}, expected {form[1]}"
        elif len(value) > MAX_TEXT:
            fault = f"a text of {len(value)} characters, expected {MAX_TEXT} at most"
        elif found := _CONTROL.search(value):
            fault = f"a text with the control character {found[0]!r}"
    elif isinstance(value, int):
        largest = _LARGEST.get(name, 2**53 - 1)
        if not 0 <= value <= largest:
            fault = f"{str(value)[:40]}, expected 0 to {largest}"
    elif isinstance(value, tuple):
        for item in value:
            _check_values(item, name, where)
    elif isinstance(value, Settings):
        for field in type(value).model_fields:
            _check_values(getattr(value, field), field, f"{where}.{field}")
    elif dataclasses.is_dataclass(value):
        for part in dataclasses.fields(value):
            _check_values(getattr(value, part.name), part.name, f"{where}.{part.name}")
    if fault:
        raise ProtocolError(f"message from a client: {where} is {fault}")
