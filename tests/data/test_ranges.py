from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.coordination.types import IndexRange
from manyhands.data.permutation import permute
from manyhands.data.ranges import indices_of, ranges_between
from manyhands.errors import DataError


def test_indices_follow_the_ranges_in_order() -> None:
    ranges = (IndexRange(epoch=1, start=90, stop=100), IndexRange(epoch=2, start=0, stop=3))
    found = indices_of(ranges, 100, 9)
    expected = [*permute(np.arange(90, 100), 100, 9, 1), *permute(np.arange(3), 100, 9, 2)]
    assert found.dtype == np.int64
    assert found.tolist() == [int(i) for i in expected]


def test_no_ranges_give_no_indices() -> None:
    assert indices_of((), 100, 9).shape == (0,)


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 101), (7, 6)])
def test_a_range_outside_the_data_is_refused(start: int, stop: int) -> None:
    with pytest.raises(DataError, match="100 samples"):
        indices_of((IndexRange(epoch=0, start=start, stop=stop),), 100, 9)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 50), st.integers(0, 400), st.integers(0, 200))
def test_the_stream_reads_each_sample_once_per_epoch(total: int, start: int, length: int) -> None:
    ranges = ranges_between(start, start + length, total)
    positions = [r.epoch * total + p for r in ranges for p in range(r.start, r.stop)]
    assert positions == list(range(start, start + length))
    assert all(0 <= r.start < r.stop <= total for r in ranges)


def test_a_stream_cut_in_two_is_the_same_stream() -> None:
    whole = indices_of(ranges_between(0, 250, 97), 97, 3)
    halves = [indices_of(ranges_between(a, b, 97), 97, 3) for a, b in ((0, 120), (120, 250))]
    assert np.array_equal(whole, np.concatenate(halves))
    assert np.array_equal(np.sort(whole[:97]), np.arange(97))
