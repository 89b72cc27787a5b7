"""The order of training: every row once, few groups at a time, another order in each epoch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.data.shards.order import BlockOrder

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(SIZES, st.integers(1, 9), st.integers(0, 2**63 - 1), st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_row_once_in_an_epoch(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = BlockOrder(sizes, window)
    rows = order.rows(np.arange(order.total), seed, epoch)
    assert sorted(rows.tolist()) == list(range(sum(sizes)))


@given(SIZES, st.integers(1, 9), st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_position_is_a_function_of_seed_and_epoch_alone(
    sizes: list[int], window: int, data: st.DataObject
) -> None:
    """Whatever else is asked for with it: this is what exact resume and exact splits rest on."""
    order = BlockOrder(sizes, window)
    whole = order.rows(np.arange(order.total), 3, 1)
    some = np.array(data.draw(st.lists(st.integers(0, order.total - 1), max_size=20)), dtype=np.int64)
    assert (BlockOrder(sizes, window).rows(some, 3, 1) == whole[some]).all()


def test_seeds_and_epochs_differ() -> None:
    order = BlockOrder([50] * 20, 4)
    orders = {tuple(order.rows(np.arange(1000), s, e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9


def test_a_window_touches_its_groups_alone_and_says_which() -> None:
    sizes = [30, 50, 50, 7] * 10
    order = BlockOrder(sizes, 4)
    position, seen = 0, []
    while position < order.total:
        end = order.window_end(position, 5, 2)
        groups = order.window_groups(position, 5, 2)
        rows = order.rows(np.arange(position, end), 5, 2)
        touched = np.unique(np.searchsorted(order.first, rows, side="right") - 1)
        assert set(touched.tolist()) == set(groups.tolist())
        assert len(groups) == 4
        seen += groups.tolist()
        position = end
    assert sorted(seen) == list(range(40))


def test_rows_are_mixed_within_a_window() -> None:
    """Neighbours come from different groups about as often as chance has it."""
    order = BlockOrder([100] * 32, 32)
    rows = order.rows(np.arange(3200), 1, 0)
    same = np.mean(rows[1:] // 100 == rows[:-1] // 100)
    assert same == pytest.approx(1 / 32, abs=0.015)


def test_the_order_is_fixed() -> None:
    """A change here changes the order of data of every training on shards."""
    order = BlockOrder([5, 5, 5, 2], 2)
    assert order.rows(np.arange(17), 1337, 0).tolist() == [
        6, 8, 5, 9, 2, 1, 7, 0, 3, 4, 15, 12, 11, 13, 14, 16, 10,
    ]  # fmt: skip
