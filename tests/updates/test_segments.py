"""Pieces cover everything once, keep their order, and carry their thread's errors out."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import WorkerError
from manyhands.plan.schema import Codec
from manyhands.updates.segments import for_each, segments


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    length=st.integers(1, 500),
    block=st.integers(16, 64),
    name=st.sampled_from(["fp32", "int8"]),
)
def test_pieces_cover_every_element_once(make, sizes, length, block, name):
    parameters = make.parameters({f"p{i}": (n,) for i, n in enumerate(sizes)})
    seen = {p.name: np.zeros(p.shape) for p in parameters}
    for piece in segments(parameters, Codec(name=name, block=block), length):
        assert name == "fp32" or piece.start % block == 0
        piece.of(seen[piece.name])[...] += 1
    assert all((array == 1).all() for array in seen.values())


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_results_come_in_the_order_of_the_pieces(make, threads):
    pieces = segments(make.parameters({"a": (10,), "b": (13,)}), Codec(), 3)
    found = for_each(pieces, lambda p, s: (p, s.shape), threads, rows=2)
    assert [piece for piece, _ in found] == pieces
    assert {shape for _, shape in found} == {(2, 3)}


def test_scratch_belongs_to_one_thread(make):
    pieces = segments(make.parameters({"a": (64,)}), Codec(), 1)
    barrier = threading.Barrier(2, timeout=30)

    def fill(piece, scratch):
        scratch[0, 0] = piece.start
        if piece.start in (0, 32):
            barrier.wait()
        return scratch[0, 0] == piece.start

    assert all(for_each(pieces, fill, 2, rows=1))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_piece_is_raised(make, threads):
    def fail(piece, _):
        if piece.start == 8:
            raise WorkerError("piece 8")

    with pytest.raises(WorkerError, match="piece 8"):
        for_each(segments(make.parameters({"a": (10,)}), Codec(), 1), fail, threads)


def test_nothing_to_do_is_fine():
    assert for_each([], lambda *_: 1, 4) == []


def test_an_array_that_would_be_copied_is_a_defect(make):
    piece = segments(make.parameters({"a": (4, 4)}), Codec())[0]
    with pytest.raises(AssertionError):
        piece.of(np.zeros((4, 4), np.float32).T)


def test_no_arithmetic_where_subnormals_are_flushed(make):
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with pytest.raises(WorkerError, match="flushes subnormal"):
            for_each(segments(make.parameters({"a": (4,)}), Codec()), lambda *_: None, 1)
    finally:
        torch.set_flush_denormal(False)
