"""The fingerprint against its definition and its vectors, and the guard against flushing subnormals."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import WorkerError
from manyhands.updates.exact import BLOCK_BYTES, fingerprint, require_subnormals, single

MASK = 2**64 - 1


def formula(start, count):
    i = np.arange(start, start + count, dtype=np.uint64)
    return (
        ((i * np.uint64(2654435761) + np.uint64(12345)) & np.uint64(0xFFFFFFFF))
        .astype(np.uint32)
        .view(np.float32)
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_fingerprint_equals_the_vectors(vectors, threads):
    for case in vectors("fingerprint"):
        tensors = {name: formula(*where) for name, where in case["tensors"].items()}
        found = fingerprint(tensors, threads=threads)
        assert [f"{block:016x}" for block in found.blocks] == case["blocks"]
        assert found.hex == case["fingerprint"]


def test_fingerprint_of_nothing_is_the_hash_of_nothing():
    assert fingerprint({}).blocks == ()
    assert fingerprint({}).hex == hashlib.sha256(b"").hexdigest()


def factor(i):
    z = (i + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return (z ^ (z >> 31)) | 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    place=st.integers(0, 10**6),
    bit=st.integers(0, 31),
)
def test_any_flipped_bit_changes_the_fingerprint(sizes, seed, place, bit):
    source = np.random.default_rng(seed)
    tensors = {
        f"t{i}": source.integers(0, 2**32, n, dtype=np.uint32).view(np.float32) for i, n in enumerate(sizes)
    }
    before = fingerprint(tensors)
    flat = np.concatenate([tensors[name].view(np.uint32) for name in sorted(tensors)])
    assert before.blocks == (sum(int(b) * factor(i) for i, b in enumerate(flat)) & MASK,)
    name = sorted(tensors)[place % len(tensors)]
    tensors[name].view(np.uint32)[place % tensors[name].size] ^= np.uint32(1 << bit)
    assert fingerprint(tensors).hex != before.hex


def test_a_flipped_bit_shows_in_its_block_only():
    values = np.zeros(BLOCK_BYTES // 4 + 100, np.float32)
    before = fingerprint({"w": values})
    values.view(np.uint32)[-1] ^= np.uint32(1)
    after = fingerprint({"w": values})
    assert [a == b for a, b in zip(before.blocks, after.blocks, strict=True)] == [True, False]


def test_shape_and_layout_in_memory_do_not_matter():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert fingerprint({"w": values}) == fingerprint({"w": values.reshape(-1)})
    assert fingerprint({"w": np.asfortranarray(values)}) == fingerprint({"w": values})


def test_only_fp32_has_a_fingerprint():
    with pytest.raises(TypeError, match="float64"):
        fingerprint({"w": np.zeros(3)})


def test_a_thread_that_flushes_subnormals_is_refused():
    require_subnormals()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(WorkerError, match="set_flush_denormal"):
            require_subnormals()
    finally:
        torch.set_flush_denormal(False)
    require_subnormals()


def test_a_constant_is_rounded_once_to_nearest_even():
    assert single(1 + 2**-24) == np.float32(1)
    assert single(1 + 3 * 2**-24) == np.float32(1 + 2**-22)
