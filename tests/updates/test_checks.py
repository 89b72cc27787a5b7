"""Norms and finiteness for large and odd sizes; what is refused and how it is named is in test_merge.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import UpdateError
from manyhands.updates.checks import check_values


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 5000),
    seed=st.integers(0, 1000),
    power=st.integers(-18, 15),
    threads=st.integers(1, 3),
)
def test_the_norm_is_right_to_six_digits(make, size, seed, power, threads):
    values = (np.random.default_rng(seed).normal(size=size) * 10.0**power).astype(np.float32)
    found = check_values(
        make.plan(), make.parameters({"w": (size,)}), {"delta/w": values}, None, threads=threads
    )
    assert found == pytest.approx(np.linalg.norm(values.astype(np.float64)), rel=1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 600_000),
    place=st.floats(0, 1, exclude_max=True),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_one_bad_value_is_found_wherever_it_is(make, size, place, value):
    values = np.ones(size, np.float32)
    at = int(place * size)
    values[at] = value
    with pytest.raises(UpdateError, match=rf"'delta/w' is .* at position {at};"):
        check_values(make.plan(), make.parameters({"w": (size,)}), {"delta/w": values}, None)


def test_large_finite_values_are_told_from_infinite_ones(make):
    """Squares of 1e25 overflow fp32: the values are looked at one by one, and it is the norm that is refused."""
    values = {"delta/w": np.full(3, 1e25, np.float32)}
    with pytest.raises(UpdateError, match=r"the norm of 'delta' is 1.73e\+25"):
        check_values(make.plan(), make.parameters({"w": (3,)}), values, None)
