"""What a client may say: exactly typed, bounded, finite, in its form; everything else is one clear ProtocolError."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.coordination.effects import Closed
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
from manyhands.coordination.types import BlobRef, Claims, Closing, Contribution, Counted, OuterTerms, Snapshot
from manyhands.errors import ProtocolError
from manyhands.network import messages
from manyhands.network.messages import (
    MAX_MESSAGE_BYTES,
    MAX_TEXT,
    Ack,
    Challenge,
    Deliver,
    Goodbye,
    Heartbeat,
    Hello,
    Intent,
    IntentBody,
    Opening,
    Progress,
    Proof,
    Rejected,
    SnapshotOffer,
    Welcome,
    encode,
    from_client,
    from_server,
    plain_text,
)

KEY, BLOB, COMMIT, NONCE = "a" * 64, "b" * 64, "c" * 64, "d" * 64
SIGNATURE = "e" * 128
REF = BlobRef(blob=BLOB, size_bytes=1000)

CONTRIBUTION = Contribution(
    assignment="3-17",
    round=3,
    client=KEY,
    commit=COMMIT,
    update=REF,
    nonce=NONCE,
    claims=Claims(norm=1.5, loss=2.25, tokens=960, samples=30, work_ms=1200, start="2-11", threads=2),
    signature=SIGNATURE,
)
BODIES: tuple[IntentBody, ...] = (
    Ready(client=KEY, round=3),
    Committed(client=KEY, round=3, assignment="3-17", commit=COMMIT),
    Opening(assignment="3-17", round=3, update=REF, nonce=NONCE),
    Contributed(contribution=CONTRIBUTION),
    WorkFailed(client=KEY, assignment="3-17", reason="the loss is nan at step 4\n\ttry a lower rate"),
    Verdict(by=KEY, round=3, assignment="3-17", accepted=True, norm=1.5),
    Fingerprinted(client=KEY, round=3, fingerprint="0" * 64),
    SnapshotOffer(round=5, blob=REF),
    SnapshotStored(by=KEY, snapshot=Snapshot(round=5, blob=REF, fingerprint="0" * 64)),
    Left(client=KEY, how="left", reason="stopped by its owner"),
)
HELLO = Hello(versions=(1,), run_id="demo-1a2b3c", client=KEY, nonce=NONCE, boot="f" * 32, label="Büro")
MESSAGES = (
    HELLO,
    HELLO.model_copy(update={"seen": (12, 0), "has_round": 3, "plan_hash": BLOB}),
    Proof(signature=SIGNATURE),
    Heartbeat(),
    Heartbeat(progress=Progress(round=3, activity="working", step=4, steps=30, loss=2.5, tokens_per_s=1e4)),
    *(Intent(id=f"f00ba412-{n}", body=body) for n, body in enumerate(BODIES)),
)


def test_every_kind_of_intent_is_in_the_examples() -> None:
    kinds = {type(body) for body in BODIES}
    assert kinds == set(IntentBody.__origin__.__args__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: getattr(getattr(m, "body", m), "kind", m.type))
def test_what_a_client_says_comes_back_equal(message: Any) -> None:
    assert from_client(encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Challenge(version=1, server=KEY, nonce=NONCE, signature=SIGNATURE),
        Welcome(token="t", descriptor="{}", signature=SIGNATURE, heartbeat_s=0.5, resumed=False),
        Rejected(reason="full", final=False),
        Ack(id="a-1", error="no"),
        Goodbye(reason="going down", final=False),
        Deliver(
            id=(7, 2),
            body=Closed(
                closing=Closing(
                    round=1,
                    fragment=0,
                    counted=(Counted(assignment="1-2", client=KEY, update=REF, weight=3, factor=0.5),),
                    uncounted=(),
                    outer=OuterTerms(lr=0.7),
                    closed_ms=5,
                ),
                change=REF,
                fingerprint="0" * 64,
            ),
            signature=SIGNATURE,
        ),
    ],
    ids=lambda m: m.type,
)
def test_what_the_server_says_comes_back_equal(message: Any) -> None:
    assert from_server(encode(message)) == message


# ------------------------------------------------------------------------------------------- single faults
def changed(message: Any, path: str, value: Any) -> str:
    """The message's JSON with one value put in."""
    data = json.loads(encode(message))
    at = data
    *way, last = path.split(".")
    for key in way:
        at = at[key]
    at[last] = value
    return json.dumps(data)


CONTRIBUTED, READY = MESSAGES[-7], MESSAGES[-10]
CLAIMS = "body.contribution.claims"


@pytest.mark.parametrize(
    ("message", "path", "value", "fault"),
    [
        # unknown keys, at every depth: what is signed must be all there is
        (HELLO, "extra", 1, "Extra inputs"),
        (READY, "extra", 1, "Extra inputs"),
        (READY, "body.extra", 1, "extra"),
        (CONTRIBUTED, "body.contribution.extra", 1, "extra"),
        (CONTRIBUTED, f"{CLAIMS}.extra", 1, "extra"),
        (CONTRIBUTED, "body.contribution.update.extra", 1, "extra"),
        # types are what they are
        (READY, "body.round", "3", "valid integer"),
        (READY, "body.round", True, "valid integer"),
        (READY, "body.round", 3.0, "valid integer"),
        (READY, "body.round", None, "valid integer"),
        (READY, "body.client", 7, "valid string"),
        (CONTRIBUTED, f"{CLAIMS}.norm", "1.5", "valid number"),
        (CONTRIBUTED, f"{CLAIMS}.norm", None, "valid number"),
        (CONTRIBUTED, "body.contribution.update", [BLOB, 1000], "update"),
        (HELLO, "versions", 1, "versions: "),
        (HELLO, "seen", [1], "seen"),
        # numbers
        (CONTRIBUTED, f"{CLAIMS}.norm", math.nan, "finite"),
        (CONTRIBUTED, f"{CLAIMS}.norm", math.inf, "finite"),
        (CONTRIBUTED, f"{CLAIMS}.loss", math.nan, "finite"),
        (CONTRIBUTED, f"{CLAIMS}.loss", -math.inf, "finite"),
        (MESSAGES[-5], "body.norm", math.nan, "finite"),
        (MESSAGES[4], "progress.loss", math.nan, "finite"),
        (MESSAGES[4], "progress.tokens_per_s", math.inf, "finite"),
        (READY, "body.round", -1, "expected 0 to"),
        (READY, "body.round", 2**53, "expected 0 to"),
        (READY, "body.round", 10**300, "expected 0 to"),
        (CONTRIBUTED, f"{CLAIMS}.tokens", 10**400, "expected 0 to"),
        (CONTRIBUTED, f"{CLAIMS}.work_ms", -5, "expected 0 to"),
        (CONTRIBUTED, f"{CLAIMS}.threads", 4097, "expected 0 to 4096"),
        (CONTRIBUTED, "body.contribution.update.size_bytes", -1, "expected 0 to"),
        (MESSAGES[4], "progress.bytes_up", -1, "expected 0 to"),
        (MESSAGES[1], "seen", [-1, 0], "expected 0 to"),
        (HELLO, "versions", [10**30], "expected 0 to"),
        (HELLO, "versions", [], "at least 1"),
        (HELLO, "versions", [1] * 17, "at most 16"),
        # identifiers
        (READY, "body.client", "A" * 64, "64 hex digits"),
        (READY, "body.client", "everyone", "64 hex digits"),
        (CONTRIBUTED, "body.contribution.update.blob", "../../../etc/passwd", "64 hex digits"),
        (CONTRIBUTED, "body.contribution.commit", "", "64 hex digits"),
        (CONTRIBUTED, "body.contribution.signature", "e" * 127, "128 hex digits"),
        (CONTRIBUTED, "body.contribution.nonce", "d" * 63, "64 hex digits"),
        (CONTRIBUTED, "body.contribution.assignment", "3-x", "<round>-<ordinal>"),
        (CONTRIBUTED, f"{CLAIMS}.start", "stale", "'fresh' or an assignment"),
        (MESSAGES[-4], "body.fingerprint", "", "hex digits"),
        (MESSAGES[-4], "body.fingerprint", "0" * 129, "hex digits"),
        (HELLO, "boot", "xyz", "match pattern"),
        (HELLO, "run_id", "../..", "match pattern"),
        (READY, "id", "A b", "match pattern"),
        # text
        (HELLO, "label", "x" * 65, "at most 64"),
        (HELLO, "label", "\x1b[2J", "control character"),
        (HELLO, "label", "\u202egpj.exe", "control character"),
        (MESSAGES[-6], "body.reason", "x" * (MAX_TEXT + 1), "4096 at most"),
        (MESSAGES[-6], "body.reason", "\x00", "control character"),
        (CONTRIBUTED, f"{CLAIMS}.device", "cpu\x9b1A", "control character"),
        # who says what
        (READY, "type", "goodbye", "does not match any of the expected tags"),
        (READY, "body.kind", "advanced", "does not match any of the expected tags"),
        (READY, "body.kind", "server_started", "does not match any of the expected tags"),
        (MESSAGES[-1], "body.how", "exploded", "left"),
    ],
)
def test_one_fault_is_one_clear_error(message: Any, path: str, value: Any, fault: str) -> None:
    with pytest.raises(ProtocolError, match="message from a client") as error:
        from_client(changed(message, path, value))
    assert fault in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "7",
        "[]",
        '"hello"',
        "{",
        "{}",
        '{"type": "hello"}',
        "not json at all",
        '{"type": "heartbeat"} {"type": "heartbeat"}',
        '{"type": "heartbeat", "progress": {"loss": 1e999}}',
        '{"type": "heartbeat", "progress": {"step": 1' + "0" * 5000 + "}}",
        r'{"type": "heartbeat", "progress": {"activity": "\ud800"}}',
        "\ud800",
        "[" * 100_000,
        '{"a":' * 40_000,
        '{"type": "intent", "id": "a", "body": ' + '{"kind":' * 300 + "1" + "}" * 301,
    ],
    ids=lambda text: text[:24],
)
def test_garbage_is_refused(text: str) -> None:
    with pytest.raises(ProtocolError):
        from_client(text)
    with pytest.raises(ProtocolError):
        from_server(text)


def test_keys_of_the_sender_do_not_make_the_error_long_or_dangerous() -> None:
    with pytest.raises(ProtocolError) as error:
        from_client(changed(READY, "x" * 10_000 + "\x1b[2J", 1))
    assert len(str(error.value)) < 400
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("letter", ["x", "ü", "🙂"])
def test_size_is_counted_in_bytes(letter: str) -> None:
    room = MAX_MESSAGE_BYTES - len(json.dumps({"type": letter}, ensure_ascii=False).encode())
    count = room // len(letter.encode())
    fits = json.dumps({"type": letter * (1 + count)}, ensure_ascii=False)
    assert MAX_MESSAGE_BYTES - 4 < len(fits.encode()) <= MAX_MESSAGE_BYTES

    with pytest.raises(ProtocolError, match="Input tag"):  # it was parsed
        from_client(fits)
    with pytest.raises(ProtocolError, match=r"a message of \d+ bytes; at most 262144"):
        from_client(json.dumps({"type": letter * (2 + count)}, ensure_ascii=False))


def test_plain_text_is_what_a_message_takes() -> None:
    wild = "line one\n\tline two\x1b[31m\x00\ud800" + "x" * 1000
    tame = plain_text(wild, 500)

    assert len(tame) == 500
    assert tame.startswith("line one\n\tline two [31m  xxx")
    failed = WorkFailed(client=KEY, assignment="0-0", reason=tame)
    assert from_client(encode(Intent(id="a", body=failed))) == Intent(id="a", body=failed)


# ------------------------------------------------------------------------------------------- anything at all
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    here = [at] if at else []
    if isinstance(data, dict):
        return here + [p for key, value in data.items() for p in _paths(value, (*at, key))]
    return here


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_put_in_somewhere_parses_or_is_a_protocol_error(data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(MESSAGES))
    plain = json.loads(encode(message))
    *way, last = data.draw(st.sampled_from(_paths(plain)))
    at = plain
    for key in way:
        at = at[key]
    at[last] = data.draw(JSON)
    try:
        parsed = from_client(json.dumps(plain))
    except ProtocolError:
        return
    for value in _leaves(parsed.model_dump()):
        assert not isinstance(value, float) or math.isfinite(value)
        assert isinstance(value, bool) or not isinstance(value, int) or 0 <= value < 2**53
        assert not isinstance(value, str) or len(value) <= MAX_TEXT


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(max_size=200) | JSON.map(json.dumps))
@pytest.mark.parametrize("parse", [from_client, from_server])
def test_any_text_parses_or_is_a_protocol_error(parse: Callable[[str], Any], text: str) -> None:
    try:
        parse(text)
    except ProtocolError:
        return
    raise AssertionError("hypothesis has guessed a whole message")


def test_the_limits_fit_each_other() -> None:
    """A message of the largest kind with the longest texts must pass the size limit."""
    longest = Contributed(contribution=CONTRIBUTION)
    assert len(encode(Intent(id="a" * 64, body=longest))) + 8 * MAX_TEXT < MAX_MESSAGE_BYTES
    assert messages.MAX_DELIVERY_BYTES > MAX_MESSAGE_BYTES
