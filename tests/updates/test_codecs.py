"""Codecs against their vectors, and what holds for any values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manyhands.plan.schema import Codec
from manyhands.updates.codecs import CODECS, NUMPY, codec_of, decode, encode
from manyhands.updates.segments import segments

ANY = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32))
PROPERTIES = settings(max_examples=60, deadline=None, derandomize=True)


def test_bf16_equals_the_vectors(vectors, unhex):
    for case in vectors("bf16"):
        values = unhex(case["values"])
        wire = encode(values, Codec(name="bf16"))
        expected = np.frombuffer(bytes.fromhex(case["bf16"]), ">u2")
        assert wire[""].tolist() == expected.tolist()
        assert decode(wire, Codec(name="bf16")).view(np.uint32).tolist() == [int(e) << 16 for e in expected]


def test_int8_equals_the_vectors(vectors, unhex, bits):
    for case in vectors("int8"):
        settings_ = Codec(name="int8", block=case["block"])
        wire = encode(unhex(case["values"]), settings_)
        assert bits(wire[".scale"]) == bits(unhex(case["scales"]))
        assert wire[""].tolist() == case["quantized"]
        assert bits(decode(wire, settings_)) == bits(unhex(case["decoded"]))


@pytest.mark.parametrize("name", sorted(CODECS))
@PROPERTIES
@given(values=ANY, block=st.integers(16, 70))
def test_wire_tensors_fit_the_schema_and_decode_to_the_shape(name, values, block):
    chosen = Codec(name=name, block=block)
    wire = encode(values, chosen)
    schema = codec_of(chosen).schema(values.shape, chosen)
    assert {s: (NUMPY[d], shape) for s, (d, shape) in schema.items()} == {
        s: (a.dtype.str.replace("|b1", "?").replace("|", ""), a.shape) for s, a in wire.items()
    }
    assert decode(wire, chosen).shape == values.shape


@PROPERTIES
@given(values=ANY)
def test_fp32_loses_nothing(values):
    assert decode(encode(values, Codec()), Codec()).tobytes() == values.tobytes()


@PROPERTIES
@given(values=ANY)
def test_bf16_is_off_by_half_a_unit_at_most(values):
    found = decode(encode(values, Codec(name="bf16")), Codec(name="bf16"))
    units = np.exp2(np.maximum(np.frexp(values)[1] - 1, -126).astype(np.float64) - 7)
    assert (np.abs(found.astype(np.float64) - values) <= units / 2).all()


@PROPERTIES
@given(values=ANY, block=st.integers(16, 70))
def test_int8_is_off_by_half_a_scale_at_most_and_keeps_the_largest(values, block):
    chosen = Codec(name="int8", block=block)
    found = decode(encode(values, chosen), chosen)
    for start in range(0, values.size, block):
        part, back = (a[start : start + block].astype(np.float64) for a in (values, found))
        scale = np.abs(part).max() / 127
        assert (np.abs(part - back) <= scale * 0.5001 + 1e-45 * 127).all()


@pytest.mark.parametrize("name", sorted(CODECS))
@PROPERTIES
@given(values=ANY, block=st.integers(16, 40), length=st.integers(1, 90))
def test_pieces_give_the_same_bytes_as_the_whole(make, name, values, block, length):
    chosen = Codec(name=name, block=block)
    whole = encode(values, chosen)
    pieces = segments(make.parameters({"w": values.shape}), chosen, length)
    assert sum(p.stop - p.start for p in pieces) == values.size
    out = {suffix: np.zeros_like(array) for suffix, array in whole.items()}
    back = np.empty_like(values)
    for piece in pieces:
        parts = codec_of(chosen).parts(piece.start, piece.stop, chosen)
        codec_of(chosen).encode(piece.of(values), chosen, {s: out[s][p] for s, p in parts.items()})
        codec_of(chosen).decode({s: out[s][p] for s, p in parts.items()}, chosen, piece.of(back))
    assert all(out[suffix].tobytes() == array.tobytes() for suffix, array in whole.items())
    assert back.tobytes() == decode(whole, chosen).tobytes()


@pytest.mark.parametrize("shape", [(), (1,), (3, 5, 7)])
@pytest.mark.parametrize("name", sorted(CODECS))
def test_any_shape_goes_there_and_back(name, shape):
    chosen = Codec(name=name, block=16)
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    assert decode(encode(values, chosen), chosen) == pytest.approx(values, rel=0.01, abs=1)
