"""The run descriptor: signed by the server that it names, and believed only whole."""

import json
from typing import Any

import pytest

from manyhands.errors import IdentityError, PlanError, ProtocolError, Refused
from manyhands.identity.canonical import sign_document
from manyhands.identity.keys import Identity, ephemeral
from manyhands.plan.descriptor import Material, Parameter, RunDescriptor
from manyhands.plan.resolve import plan_hash, resolve
from manyhands.plan.schema import Plan, Rounds
from manyhands.plan.signing import (
    MAX_DESCRIPTOR_BYTES,
    dump_descriptor,
    load_descriptor,
    sign_descriptor,
    verify_descriptor,
)

SERVER = Identity(bytes(range(32)))
PLAN = resolve({"preset": "fedadam", "outer": {"lr": 0.1}, "seed": 2**62 + 1})


def descriptor(**changes: Any) -> RunDescriptor:
    values: dict[str, Any] = {
        "run_id": "run-1",
        "plan": PLAN,
        "plan_hash": plan_hash(PLAN),
        "samples": 1000,
        "parameters": (Parameter(name="w", shape=(2, 3)), Parameter(name="b", shape=(3,), trainable=False)),
        "materials": {"tokens.bin": Material(blob="ab" * 32, size_bytes=10)},
        "first_snapshot": Material(blob="cd" * 32, size_bytes=36),
        "first_fingerprint": "0123",
        "server_key": SERVER.public,
    }
    return RunDescriptor(**{**values, **changes})


def signature_of(made: RunDescriptor) -> str:
    """A signature over whatever it is, right or wrong."""
    return sign_document(SERVER, "manyhands run descriptor v1", made)


def test_a_signed_descriptor_comes_through_text_unchanged() -> None:
    made = descriptor()
    signature = sign_descriptor(SERVER, made)
    assert signature == signature_of(made)
    assert verify_descriptor(made, signature, SERVER.public) is made
    text = dump_descriptor(made)
    assert verify_descriptor(text, signature, SERVER.public) == made
    assert verify_descriptor(text.encode(), signature, SERVER.public) == made
    assert verify_descriptor(json.dumps(json.loads(text), indent=3), signature, SERVER.public) == made


def test_only_the_named_server_signs() -> None:
    with pytest.raises(IdentityError, match="names the server key"):
        sign_descriptor(ephemeral(), descriptor())


def test_another_server_or_signature_is_refused() -> None:
    made = descriptor()
    signature = sign_descriptor(SERVER, made)
    with pytest.raises(Refused, match="has proved"):
        verify_descriptor(made, signature, ephemeral().public)
    for bad in ("", "00" * 64, signature[:-1] + ("0" if signature[-1] != "0" else "1"), signature.upper()):
        with pytest.raises(Refused, match="does not bear the signature"):
            verify_descriptor(made, bad, SERVER.public)
    with pytest.raises(Refused, match="does not bear the signature"):
        verify_descriptor(made, sign_document(SERVER, "closing", made), SERVER.public)


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "run-2"},
        {"plan": resolve({"preset": "fedadam", "outer": {"lr": 0.10000000000000002}, "seed": 2**62 + 1})},
        {"plan_hash": "00" * 32},
        {"samples": 1001},
        {"parameters": (Parameter(name="w", shape=(3, 2)),)},
        {"materials": {"tokens.bin": Material(blob="ab" * 32, size_bytes=11)}},
        {"materials": {}},
        {"first_snapshot": Material(blob="ce" * 32, size_bytes=36)},
        {"first_fingerprint": "0124"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_any_change_is_noticed(changes: dict[str, Any]) -> None:
    signature = sign_descriptor(SERVER, descriptor())
    with pytest.raises(Refused, match="does not bear the signature"):
        verify_descriptor(descriptor(**changes), signature, SERVER.public)


def test_a_plan_that_hashes_to_something_else_here() -> None:
    made = descriptor(plan_hash="00" * 32)
    with pytest.raises(Refused, match="Install the server's version"):
        verify_descriptor(made, signature_of(made), SERVER.public)


def test_names_of_parameters_are_unique() -> None:
    made = descriptor(parameters=(Parameter(name="w", shape=(1,)), Parameter(name="w", shape=(1,))))
    with pytest.raises(Refused, match="1 parameters whose name is taken"):
        verify_descriptor(made, signature_of(made), SERVER.public)


def test_a_plan_that_is_not_supported_here() -> None:
    plan = Plan(rounds=Rounds(lag=1))
    made = descriptor(plan=plan, plan_hash=plan_hash(plan))
    with pytest.raises(PlanError, match=r"run 'run-1': 'rounds\.lag' is 1"):
        verify_descriptor(made, signature_of(made), SERVER.public)


def changed(**changes: Any) -> str:
    return json.dumps({**json.loads(dump_descriptor(descriptor())), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ("{", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        ("[" * 1_000_000, "not readable as JSON"),
        ("[]", "a JSON list, expected an object"),
        ("null", "a JSON NoneType, expected an object"),
        ('{"version": 1, "version": 1}', "a key is there twice"),
        ('{"samples": NaN}', "NaN is not a number"),
        ('{"samples": -Infinity}', "-Infinity is not a number"),
        ('{"samples": ' + "9" * 5000 + "}", "not readable as JSON"),
        ('{"x": ' + "[" * 100 + "]" * 100 + "}", "nested deeper than 40"),
        (" " * (MAX_DESCRIPTOR_BYTES + 1), "bytes: at most"),
        (changed(version=2), "'version' is 2.*another version of manyhands"),
        (changed(extra=1), "unknown key 'extra'"),
        (changed(run_id="Run 1"), "'run_id' is 'Run 1'"),
        (changed(samples=0), "'samples' is 0"),
        (changed(parameters=[{"name": "w", "shape": [0]}]), r"'parameters\.0\.shape\.0' is 0"),
        (changed(server_key="x"), "'server_key' is 'x'"),
        ("{}", "is missing"),
    ],
    ids=range(19),
)
def test_text_that_is_no_descriptor(text: str | bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=f"(?s){message}") as caught:
        load_descriptor(text)
    assert len(str(caught.value)) < 2000
