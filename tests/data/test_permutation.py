from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.data.permutation import permute, splitmix64

TOTALS = [1, 2, 3, 4, 5, 7, 15, 16, 17, 64, 65, 97, 255, 256, 257, 1009, 4096, 4097, 65_536, 65_537]


@pytest.mark.parametrize("total", TOTALS)
def test_every_sample_comes_once(total: int) -> None:
    samples = permute(np.arange(total), total, seed=11, epoch=2)
    assert samples.dtype == np.int64
    assert np.array_equal(np.sort(samples), np.arange(total))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10_000))
def test_a_bijection_for_any_total_seed_and_epoch(total: int, seed: int, epoch: int) -> None:
    samples = permute(np.arange(total), total, seed, epoch)
    assert np.array_equal(np.sort(samples), np.arange(total))


def test_seeds_and_epochs_give_different_orders() -> None:
    orders = [permute(np.arange(1000), 1000, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one == other) < 0.02


def test_the_order_is_not_nearly_sorted() -> None:
    samples = permute(np.arange(10_000), 10_000, 1337, 0).astype(np.float64)
    correlation = np.corrcoef(np.arange(10_000), samples)[0, 1]
    assert abs(correlation) < 0.05
    neighbours = np.abs(np.diff(samples))
    assert 3000 < neighbours.mean() < 3700  # a random order: a third of the total


def test_a_part_is_the_part_of_the_whole() -> None:
    whole = permute(np.arange(777), 777, 5, 1)
    assert np.array_equal(permute(np.array([[3, 700], [0, 776]]), 777, 5, 1), whole[[[3, 700], [0, 776]]])


def test_golden_values_guard_the_format() -> None:
    # A change here changes the order of data of every run.
    assert permute(np.arange(10), 10, 1337, 0).tolist() == [3, 2, 9, 6, 7, 4, 1, 8, 5, 0]
    assert permute(np.arange(5), 10**12, 1337, 3).tolist() == [
        244208137095,
        962134147898,
        350480921361,
        301284609515,
        559885046844,
    ]


def test_splitmix64_matches_the_published_sequence() -> None:
    # First output for state 0 of Vigna's splitmix64.c.
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("positions", [[-1], [10], [0, 11]])
def test_positions_outside_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"within \[0, 10\)"):
        permute(np.array(positions), 10, 1, 0)


def test_an_empty_total_is_refused_and_no_positions_are_fine() -> None:
    with pytest.raises(ValueError, match="total is 0"):
        permute(np.arange(0), 0, 1, 0)
    assert permute(np.arange(0), 5, 1, 0).shape == (0,)
