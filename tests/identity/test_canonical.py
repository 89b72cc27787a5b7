"""Canonical bytes: stable, injective on plain values, and nothing else accepted."""

import dataclasses
import enum
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from manyhands.errors import ProtocolError
from manyhands.identity.canonical import MAX_DEPTH, canonical_bytes, digest, sign_document, verify_document
from manyhands.identity.keys import Identity, ephemeral

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["$float", "$", "$$float"]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
    | st.sampled_from(["0x1.8p+0", "true", "null", "1"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equality that tells 1 from True and 1.0, and 0.0 from -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return a == b and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def read_back(data: bytes) -> Any:
    """An independent reader of the form: what it gives back shows that nothing was lost."""

    def undo(value: Any) -> Any:
        if isinstance(value, list):
            return [undo(item) for item in value]
        if isinstance(value, dict):
            if list(value) == ["$float"]:
                return float.fromhex(value["$float"])
            return {key[1:] if key.startswith("$") else key: undo(item) for key, item in value.items()}
        return value

    return undo(json.loads(data))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(VALUES)
def test_nothing_is_lost(value: Any) -> None:
    assert same(read_back(canonical_bytes(value)), value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(VALUES, VALUES)
def test_different_values_have_different_bytes(a: Any, b: Any) -> None:
    assert (canonical_bytes(a) == canonical_bytes(b)) == same(a, b)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(TEXT, SCALARS, max_size=6), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random: Any) -> None:
    keys = list(value)
    random.shuffle(keys)
    assert canonical_bytes({key: value[key] for key in keys}) == canonical_bytes(value)


def test_the_form_is_fixed() -> None:
    value = {"b": [1, 1.5, True, None, "ä\n\U0001f600"], "a": (-0.0,), "$x": {"": 2**64 - 1}}
    assert (
        canonical_bytes(value)
        == (
            '{"$$x":{"":18446744073709551615},"a":[{"$float":"-0x0.0p+0"}],'
            '"b":[1,{"$float":"0x1.8000000000000p+0"},true,null,"ä\\n\U0001f600"]}'
        ).encode()
    )


def test_digests_are_fixed() -> None:
    assert digest({"lr": 0.1}, "test") == "d5dcdb7e96cea70987c0fe74956e545243754c8c2fd4a3d678ddc1875eb17f96"


def test_look_alikes_differ() -> None:
    look_alikes = [
        1,
        1.0,
        True,
        "1",
        "true",
        {"$float": (1.0).hex()},
        {"$$float": (1.0).hex()},
        [1],
        None,
        "",
        {},
        [],
    ]
    assert len({canonical_bytes(value) for value in look_alikes}) == len(look_alikes)


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: float
    y: tuple[int, ...] = ()


@dataclasses.dataclass
class Loose:
    x: int


class Model(BaseModel):
    point: Point
    name: str = "n"


class Colour(enum.StrEnum):
    RED = "red"


def test_dataclasses_and_models_are_the_mapping_of_their_fields() -> None:
    model = Model(point=Point(x=0.5, y=(1, 2)))
    assert canonical_bytes(model) == canonical_bytes({"name": "n", "point": {"y": [1, 2], "x": 0.5}})


@pytest.mark.parametrize(
    "value",
    [
        b"bytes", {1, 2}, frozenset(), object(), Colour.RED, 1j, Point, Loose(1), {1: 2}, {None: 1}, {"a":
        {b"": 1}}, float("nan"), float("inf"), -float("inf"), "\ud800", {"\udfff": 1}, 2**64, -(2**63) - 1,
        10**5000,
    ],
    ids=lambda value: f"{type(value).__name__}-{str(value)[:10]!r}" if not isinstance(value, int) else "huge",
)  # fmt: skip
def test_anything_else_is_refused(value: Any) -> None:
    for wrapped in (value, [value], {"a": value}):
        with pytest.raises(ProtocolError):
            canonical_bytes(wrapped)


def test_refusals_name_the_place() -> None:
    with pytest.raises(ProtocolError, match=r"value\.a\[1\]\.b is nan"):
        canonical_bytes({"a": [0, {"b": math.nan}]})


def test_depth_is_bounded() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    canonical_bytes(value)
    with pytest.raises(ProtocolError, match="nested deeper"):
        canonical_bytes([value])
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ProtocolError, match="nested deeper"):
        canonical_bytes(endless)


def test_domains_and_purposes_separate() -> None:
    assert digest("x", "a") != digest("x", "b")
    assert len(digest("x", "a")) == 64
    for domain in ("", "a\0b", "ä", "a\n"):
        with pytest.raises(ValueError, match="printable"):
            digest("x", domain)


def test_documents_are_signed_for_one_domain_and_one_key() -> None:
    identity = Identity(bytes(32))
    document = {"round": 3, "lr": 0.7}
    signature = sign_document(identity, "closing", document)
    assert verify_document(identity.public, "closing", {"lr": 0.7, "round": 3}, signature)
    assert not verify_document(identity.public, "opening", document, signature)
    assert not verify_document(identity.public, "closing", {**document, "lr": 0.7000000000000001}, signature)
    assert not verify_document(ephemeral().public, "closing", document, signature)
    assert not verify_document(identity.public, "closing", document, "")
