"""Schemas of what travels, and a header check that nothing malformed passes."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from manyhands.errors import PlanError, UpdateError
from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan

PARAMETERS = (
    Parameter(name="w", shape=(4, 5)),
    Parameter(name="b", shape=(3,)),
    Parameter(name="fixed", shape=(2,), trainable=False),
)


def plan(**sections):
    return Plan.parse({"task": {"name": "dummy"}, **sections})


def file_of(schema, change=None, *, pad=True, extra=b""):
    """A file of a schema with zeros for data; `change` edits the header's JSON."""
    size = wire.layout(schema).data_bytes
    body = wire.encode_header(schema)[8:]
    if change is not None:
        header = json.loads(body)
        body = change(header)
        if not isinstance(body, bytes):
            body = json.dumps(header).encode()
        if pad:
            body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body + bytes(size) + extra


# ------------------------------------------------------------------------------ schemas
def test_an_update_has_its_channels_and_only_what_is_trained():
    assert wire.update_schema(plan(), PARAMETERS) == {"delta/b": ("F32", (3,)), "delta/w": ("F32", (4, 5))}
    with_control = wire.update_schema(
        plan(local={"control_variate": True}, codec={"name": "bf16"}), PARAMETERS
    )
    assert with_control["control/w"] == ("BF16", (4, 5))
    assert len(with_control) == 4


def test_int8_has_a_scale_for_each_block():
    found = wire.update_schema(plan(codec={"name": "int8", "block": 16}), PARAMETERS)
    assert found["delta/w"] == ("I8", (4, 5))
    assert found["delta/w.scale"] == ("F32", (2,))
    assert found["delta/b.scale"] == ("F32", (1,))


def test_the_change_has_its_own_codec():
    found = wire.change_schema(plan(change_codec={"name": "bf16"}), PARAMETERS)
    assert found["delta/w"] == ("BF16", (4, 5))


@pytest.mark.parametrize(
    ("outer", "names"),
    [
        ({"name": "sgd"}, set()),
        ({"name": "sgd", "momentum": 0.5}, {"momentum"}),
        ({"name": "nesterov"}, {"momentum"}),
        ({"name": "adamw"}, {"first", "second"}),
    ],
)
def test_outer_state_follows_the_optimizer(outer, names):
    found = wire.outer_schema(plan(outer=outer), PARAMETERS)
    assert set(found) == {f"outer/{moment}/{p}" for moment in names for p in ("b", "w")}
    assert all(spec == ("F32", (4, 5)) for name, spec in found.items() if name.endswith("/w"))


def test_the_residual_is_kept_for_each_channel():
    chosen = plan(change_codec={"error_feedback": True}, local={"control_variate": True})
    assert set(wire.outer_schema(chosen, PARAMETERS)) == {
        f"outer/residual/{channel}/{p}" for channel in ("delta", "control") for p in ("b", "w")
    }


def test_a_snapshot_holds_all_parameters():
    chosen = plan(local={"control_variate": True}, outer={"name": "nesterov"})
    assert set(wire.snapshot_schema(chosen, PARAMETERS)) == {"b", "fixed", "w", "control/b", "control/w"}
    assert "outer/momentum/w" in wire.snapshot_schema(chosen, PARAMETERS, outer=True)


@pytest.mark.parametrize("name", ["control/w", "outer/first/w"])
def test_parameters_that_look_like_shared_state_are_refused(name):
    with pytest.raises(PlanError, match="rename"):
        wire.snapshot_schema(plan(), (Parameter(name=name, shape=(1,)),))


def test_parameters_that_would_share_a_name_are_refused():
    twins = (Parameter(name="w", shape=(1,)), Parameter(name="w.scale", shape=(1,)))
    with pytest.raises(PlanError, match=r"delta/w\.scale"):
        wire.update_schema(plan(codec={"name": "int8"}), twins)
    with pytest.raises(PlanError, match="trainable"):
        wire.update_schema(plan(), PARAMETERS[2:])


# ------------------------------------------------------------------------------ layout
def test_the_layout_is_the_one_of_the_reference_library():
    schema = {"b": ("F32", (3,)), "a": ("I8", (5,)), "c": ("F32", (2,)), "": ("I64", (1,))}
    arrays = {
        "b": np.ones(3, np.float32), "a": np.ones(5, np.int8), "c": np.ones(2, np.float32), "": np.ones(1, np.int64)
    }  # fmt: skip
    raw = save(arrays)
    length = int.from_bytes(raw[:8], "little")
    theirs = json.loads(raw[8 : 8 + length])
    ours = wire.layout(schema).tensors
    assert {n: e["data_offsets"][0] for n, e in theirs.items()} == {n: p.start for n, p in ours.items()}
    assert wire.check_header(raw, schema).data_start == 8 + length


NAMES = st.text(st.characters(exclude_categories=("Cs",)), max_size=12).filter(lambda n: n != "__metadata__")
SCHEMAS = st.dictionaries(
    NAMES,
    st.tuples(st.sampled_from(sorted(wire.ITEM_BYTES)), st.lists(st.integers(1, 5), max_size=3).map(tuple)),
    max_size=6,
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(schema=SCHEMAS)
def test_what_is_encoded_is_accepted(schema):
    header = wire.encode_header(schema)
    size = len(header) + wire.layout(schema).data_bytes
    assert len(header) % 64 == 0
    found = wire.check_header(header, schema, total_bytes=size)
    assert found.data_start == len(header)
    assert {n: (p.dtype, p.shape) for n, p in found.tensors.items()} == schema


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_bytes_raise_nothing_but_update_errors(data):
    schema = wire.update_schema(plan(codec={"name": "int8", "block": 16}), PARAMETERS)
    raw = bytearray(file_of(schema))
    header = len(wire.encode_header(schema))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    try:
        found = wire.check_header(bytes(raw), schema)
    except UpdateError:
        return
    assert {n: (p.dtype, p.shape, p.start) for n, p in found.tensors.items()} == {
        n: (p.dtype, p.shape, p.start) for n, p in wire.layout(schema).tensors.items()
    }


def test_a_file_and_its_first_bytes_are_checked_alike(tmp_path):
    schema = wire.update_schema(plan(), PARAMETERS)
    raw = file_of(schema)
    path = tmp_path / "u"
    path.write_bytes(raw)
    assert wire.check_header(path, schema) == wire.check_header(raw, schema)
    header = raw[: len(wire.encode_header(schema))]
    assert wire.check_header(header, schema, total_bytes=len(raw)) == wire.check_header(raw, schema)
    assert len(raw) <= wire.maximum_bytes(plan(), PARAMETERS)


# ------------------------------------------------------------------------------ what is refused
def rename(header):
    header["delta/x"] = header.pop("delta/w")


def add(header):
    header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


def swap(header):
    header["delta/b"]["data_offsets"], header["delta/w"]["data_offsets"] = [80, 92], [0, 80]


HEADERS = [
    (rename, r"lacks tensor 'delta/w'"),
    (lambda h: h.pop("delta/w") and None, r"bytes long; expected"),
    (add, r"has tensor 'more'"),
    (swap, r"'delta/b' starts at byte 80 of the data; expected 0"),
    (lambda h: h["delta/w"].update(shape=[5, 4]), r"shape \[5, 4\]; expected \[4, 5\]"),
    (lambda h: h["delta/w"].update(dtype="I32"), r"dtype I32; expected F32"),
    (lambda h: h["delta/w"].update(dtype="X9"), r"dtype 'X9'; expected one of"),
    (lambda h: h["delta/w"].update(dtype=7), r"dtype 7"),
    (lambda h: h["delta/w"].update(shape=[20.0]), r"not an integer"),
    (lambda h: h["delta/w"].update(shape=[True, 20]), r"shape of 'delta/w' is not a list of sizes"),
    (lambda h: h["delta/w"].update(shape=[-4, -5]), r"not a list of sizes"),
    (lambda h: h["delta/w"].update(shape=20), r"not a list of sizes"),
    (lambda h: h["delta/w"].update(shape=[1] * 70), r"70 dimensions"),
    (lambda h: h["delta/w"].update(data_offsets=[12, 91]), r"takes bytes \[12, 91\]; expected 80 bytes"),
    (lambda h: h["delta/w"].update(data_offsets=[16, 96]), r"starts at byte 16; expected 12"),
    (lambda h: h["delta/w"].update(data_offsets=[0, 80]), r"no gaps, no overlap"),
    (lambda h: h["delta/w"].update(data_offsets=[12]), r"has 1 numbers"),
    (lambda h: h["delta/w"].update(more=1), r"does not have exactly dtype, shape and data_offsets"),
    (lambda h: h.update({"delta/w": 3}), r"does not have exactly"),
    (lambda h: h.update(__metadata__={"a": "b"}), r"carries metadata"),
    (lambda h: h.update(__metadata__={"a": 1}), r"not an object of strings"),
    (lambda h: h.update(__metadata__={"a": [[[["deep"]]]]}), r"nested 6 deep"),
    (lambda _: b"[1, 2]", r"JSON list"),
    (lambda _: b"{", r"not the JSON"),
    (lambda _: b"\xff\xfe{}", r"not the JSON"),
    (lambda _: b'{"a": NaN}', r"'NaN' is not an integer"),
    (lambda _: b'{"a": {}, "a": {}}', r"given twice"),
    (lambda _: b'{"a": ' + b"9" * 2000 + b"}", r"header"),
]


@pytest.mark.parametrize(("change", "message"), HEADERS, ids=range(len(HEADERS)))
def test_headers_that_differ_are_refused(change, message):
    schema = wire.update_schema(plan(), PARAMETERS)
    with pytest.raises(UpdateError, match=message):
        wire.check_header(file_of(schema, change), schema)


def test_lengths_that_lie_are_refused():
    schema = wire.update_schema(plan(), PARAMETERS)
    raw = file_of(schema)
    for broken, message in (
        (raw[:-1], "bytes long; expected"),
        (raw + b"\0", "bytes long; expected"),
        (raw[:7], "truncated"),
        (b"", "truncated"),
        ((2**62).to_bytes(8, "little") + raw[8:], "truncated"),
        ((10**6).to_bytes(8, "little") + bytes(2 * 10**6), "states a header of 1000000 bytes"),
        (file_of(schema, lambda _: None, pad=False), "multiple of 8|bytes long"),
    ):
        with pytest.raises(UpdateError, match=message):
            wire.check_header(broken, schema)
    with pytest.raises(UpdateError, match="expected the whole header"):
        wire.check_header(raw[:50], schema, total_bytes=len(raw))


def test_nothing_is_read_beyond_the_largest_header(tmp_path):
    """A header of many gigabytes costs nothing: the file here is sparse."""
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write((2**33).to_bytes(8, "little"))
        file.truncate(2**34)
    with pytest.raises(UpdateError, match="states a header of 8589934592 bytes"):
        wire.check_header(path, wire.update_schema(plan(), PARAMETERS))


def test_maximum_bytes_bounds_every_accepted_file():
    chosen = plan(codec={"name": "int8", "block": 16}, local={"control_variate": True})
    schema = wire.update_schema(chosen, PARAMETERS)
    data = sum(wire.ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in schema.values())
    assert data < len(file_of(schema)) <= wire.maximum_bytes(chosen, PARAMETERS)
    pretty = file_of(schema, lambda h: json.dumps(h, indent=1).encode())
    wire.check_header(pretty, schema)
    assert len(pretty) <= wire.maximum_bytes(chosen, PARAMETERS)


def test_the_header_check_needs_no_torch():
    code = "import sys, manyhands.plan.wire; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
