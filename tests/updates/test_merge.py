"""The merger: vectors, order and size of pieces, and that nothing is added before the check has passed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import UpdateError
from manyhands.plan import wire
from manyhands.updates import tensorfile
from manyhands.updates.codecs import encode
from manyhands.updates.merge import Merger


def wire_of(plan, parameters, seed, scale=1.0):
    source = np.random.default_rng(seed)
    tensors = {}
    for channel in wire.channels(plan):
        for p in parameters:
            values = (source.normal(size=p.shape) * scale).astype(np.float32)
            tensors |= {f"{channel}/{p.name}{s}": a for s, a in encode(values, plan.codec).items()}
    return tensors


def write(path, plan, parameters, tensors):
    with tensorfile.written(path, wire.update_schema(plan, parameters)) as out:
        for name, array in tensors.items():
            np.copyto(out[name], array)
    return path


def test_merge_equals_the_vectors(vectors, unhex, make, bits):
    for case in vectors("merge"):
        updates = [unhex(text) for text in case["updates"]]
        parameters = make.parameters({"w": updates[0].shape})
        for segment in (7, 1 << 18):
            merger = Merger(make.plan(), parameters, segment=segment)
            for update, weight, factor in zip(updates, case["weights"], case["factors"], strict=True):
                merger.check_arrays({"delta/w": update})
                merger.add_arrays({"delta/w": update}, weight, float.fromhex(factor))
            assert bits(merger.merged()["delta/w"]) == bits(unhex(case["merged"]))


CODECS = [{"name": "fp32"}, {"name": "bf16"}, {"name": "int8", "block": 16}]


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c["name"])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    segment=st.integers(16, 400),
    threads=st.integers(1, 4),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=4),
    control=st.booleans(),
)
def test_same_bits_for_any_piece_and_any_threads(make, codec, segment, threads, weights, control):
    plan = make.plan(codec=codec, local={"control_variate": control})
    parameters = make.parameters({"b": (1,), "w": (37, 11), "s": ()})
    found = []
    for merger in (
        Merger(plan, parameters, threads=1),
        Merger(plan, parameters, threads=threads, segment=segment),
    ):
        for seed, weight in enumerate(weights):
            update = wire_of(plan, parameters, seed)
            merger.check_arrays(update)
            merger.add_arrays(update, weight, 0.75)
        found.append({name: a.tobytes() for name, a in merger.merged(clients=len(weights) + 1).items()})
    assert found[0] == found[1]


def test_the_order_is_part_of_the_result(make):
    """Otherwise the test above would prove little: another order does give other bits."""
    plan, parameters = make.plan(), make.parameters({"w": (500,)})
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        merger = Merger(plan, parameters)
        for seed in order:
            merger.add_arrays(wire_of(plan, parameters, seed), 1)
        found.append(merger.merged()["delta/w"].tobytes())
    assert found[0] != found[1]


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c["name"])
def test_files_and_memory_give_the_same(make, tmp_path, codec):
    plan = make.plan(codec=codec)
    parameters = make.parameters({"w": (100, 7), "b": (7,)})
    files, memory = Merger(plan, parameters), Merger(plan, parameters)
    for seed in range(3):
        update = wire_of(plan, parameters, seed)
        path = write(tmp_path / f"{seed}", plan, parameters, update)
        norm = memory.check_arrays(update)
        assert files.check(path, norm) == norm
        files.add(path, seed + 1)
        memory.add_arrays(update, seed + 1)
    assert files.weight == 6
    assert {n: a.tobytes() for n, a in files.merged().items()} == {
        n: a.tobytes() for n, a in memory.merged().items()
    }


def test_control_is_divided_by_the_clients_of_the_round(make):
    plan, parameters = make.plan(local={"control_variate": True}), make.parameters({"w": (2,)})
    merger = Merger(plan, parameters)
    for weight in (3, 1):
        merger.add_arrays(
            {"delta/w": np.full(2, weight, np.float32), "control/w": np.full(2, 6, np.float32)}, weight
        )
    merged = merger.merged(clients=3)
    assert merged["delta/w"].tolist() == [2.5, 2.5]
    assert merged["control/w"].tolist() == [4, 4]


def test_clear_starts_anew_in_the_same_memory(make):
    plan, parameters = make.plan(), make.parameters({"w": (3,)})
    merger = Merger(plan, parameters)
    for value in (5.0, 2.0):
        merger.clear()
        merger.add_arrays({"delta/w": np.full(3, value, np.float32)}, 4)
        assert merger.merged()["delta/w"].tolist() == [value] * 3


def break_header(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    body = json.dumps(header).encode()
    body += b" " * (-len(body) % 8)
    path.write_bytes(len(body).to_bytes(8, "little") + body + raw[8 + length :])


def not_a_number(tensors):
    tensors["delta/w"][3, 2] = np.nan


def infinite(tensors):
    tensors["delta/w"][3, 2] = -np.inf


def enormous(tensors):
    tensors["delta/w"][3, 2] = 1e30


VALUES = [
    (not_a_number, r"'delta/w' is nan at position 17; expected finite"),
    (infinite, r"'delta/w' is -inf at position 17; expected finite"),
    (enormous, r"'delta.* is 1(\.0.*)?e\+30.*; expected .*2\^60"),
]


@pytest.mark.parametrize(("change", "message"), VALUES, ids=["nan", "inf", "enormous"])
def test_values_that_are_not_acceptable_add_nothing(make, tmp_path, change, message):
    plan, parameters = make.plan(), make.parameters({"b": (4,), "w": (6, 5)})
    tensors = wire_of(plan, parameters, 0)
    change(tensors)
    path = write(tmp_path / "bad", plan, parameters, tensors)
    refused(plan, parameters, path, message, tmp_path)


FILES = [
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes long; expected"),
    (lambda p: p.write_bytes(p.read_bytes()[:20]), "truncated"),
    (lambda p: p.write_bytes(p.read_bytes() + b"\0" * 8), "bytes long; expected"),
    (lambda p: p.unlink(), "cannot read"),
    (
        lambda p: break_header(p, lambda h: h["delta/w"].update(shape=[5, 6])),
        r"'delta/w' has shape \[5, 6\]; expected \[6, 5\]",
    ),
    (
        lambda p: break_header(p, lambda h: h["delta/w"].update(dtype="I32")),
        "'delta/w' has dtype I32; expected F32",
    ),
]


@pytest.mark.parametrize(
    ("change", "message"), FILES, ids=["short", "stub", "long", "missing", "shape", "dtype"]
)
def test_files_that_are_not_acceptable_add_nothing(make, tmp_path, change, message):
    plan, parameters = make.plan(), make.parameters({"b": (4,), "w": (6, 5)})
    path = write(tmp_path / "bad", plan, parameters, wire_of(plan, parameters, 0))
    change(path)
    refused(plan, parameters, path, message, tmp_path)


def refused(plan, parameters, path, message, tmp_path):
    merger = Merger(plan, parameters)
    good = write(tmp_path / "good", plan, parameters, wire_of(plan, parameters, 1))
    merger.add(good, 2)
    for attempt in (merger.check, lambda p: merger.add(p, 1)):
        with pytest.raises(UpdateError, match=message):
            attempt(path)
    alone = Merger(plan, parameters)
    alone.add(good, 2)
    assert (merger.weight, merger.count) == (2, 1)
    assert {n: a.tobytes() for n, a in merger.merged().items()} == {
        n: a.tobytes() for n, a in alone.merged().items()
    }


def test_a_norm_claimed_in_vain_is_refused(make, tmp_path):
    plan, parameters = make.plan(), make.parameters({"w": (2,)})
    path = write(tmp_path / "u", plan, parameters, {"delta/w": np.array([3, 4], np.float32)})
    merger = Merger(plan, parameters)
    assert merger.check(path, 5.004) == pytest.approx(5)
    for claimed in (5.1, 4.9, 0.0, float("nan"), -5.0, float("inf")):
        with pytest.raises(UpdateError, match="was claimed"):
            merger.check(path, claimed)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_scales_must_be_finite_and_not_negative(make, value):
    plan = make.plan(codec={"name": "int8", "block": 16})
    parameters = make.parameters({"w": (40,)})
    tensors = wire_of(plan, parameters, 0)
    tensors["delta/w.scale"][1] = value
    with pytest.raises(UpdateError, match=r"'delta/w.scale' is .* at position 1"):
        Merger(plan, parameters).check_arrays(tensors)


def test_large_but_finite_values_are_not_taken_for_infinite_ones(make):
    """The squares of these overflow fp32, the values do not."""
    plan, parameters = make.plan(codec={"name": "bf16"}), make.parameters({"w": (2000,)})
    tensors = encode(np.full(2000, 1e21, np.float32), plan.codec)
    with pytest.raises(UpdateError, match="norm of 'delta'"):
        Merger(plan, parameters).check_arrays({"delta/w": tensors[""]})


@pytest.mark.parametrize(
    ("weight", "factor"), [(0, 1.0), (2**31, 1.0), (1, 0.0), (1, 1.5), (1, float("nan"))]
)
def test_weights_and_factors_out_of_bounds_are_refused(make, weight, factor):
    merger = Merger(make.plan(), make.parameters({"w": (2,)}))
    with pytest.raises(UpdateError, match="expected"):
        merger.add_arrays({"delta/w": np.ones(2, np.float32)}, weight, factor)
    assert merger.count == 0


def test_arrays_with_another_schema_are_refused(make):
    merger = Merger(make.plan(), make.parameters({"w": (2,)}))
    for tensors in (
        {},
        {"delta/w": np.ones(3, np.float32)},
        {"delta/w": np.ones(2)},
        {"delta/w": np.ones(2, np.float32), "x": np.ones(2, np.float32)},
    ):
        with pytest.raises(UpdateError):
            merger.check_arrays(tensors)


def test_nothing_added_has_no_mean(make):
    with pytest.raises(UpdateError, match="nothing was added"):
        Merger(make.plan(), make.parameters({"w": (2,)})).merged()
