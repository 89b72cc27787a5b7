from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.tasks.scores import accuracy, auc, brier, concordance_index, mean_auc, r2, rmse

PEOPLE = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6), st.booleans()), max_size=30)


def counted_by_hand(people: list[tuple[int, int, bool]]) -> float | None:
    """Harrell's C by looking at each pair."""
    concordant, pairs = 0.0, 0
    for one, other in combinations(people, 2):
        (risk, time, event), (later_risk, later, later_event) = sorted(
            (one, other), key=lambda p: (p[1], not p[2])
        )
        if not event or (time == later and later_event):
            continue
        pairs += 1
        concordant += 1.0 if risk > later_risk else 0.5 if risk == later_risk else 0.0
    return concordant / pairs if pairs else None


@settings(max_examples=200, deadline=None, derandomize=True)
@given(PEOPLE)
def test_the_concordance_index_is_that_of_all_pairs(people: list[tuple[int, int, bool]]) -> None:
    risks, times, events = (np.array([p[i] for p in people]) for i in range(3))
    found = concordance_index(risks.astype(float), times.astype(float), events.astype(bool))
    assert found == pytest.approx(counted_by_hand(people))


def test_the_concordance_index_of_known_orders() -> None:
    times, events = np.array([1.0, 2.0, 3.0, 3.0]), np.array([True, True, False, True])
    assert concordance_index(np.array([4.0, 3, 1, 2]), times, events) == 1
    assert concordance_index(np.array([1.0, 2, 4, 3]), times, events) == 0
    assert concordance_index(np.zeros(4), times, events) == 0.5
    assert concordance_index(np.arange(4.0), times, np.zeros(4, bool)) is None


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_auc_is_that_of_all_pairs(rows: list[tuple[int, bool]]) -> None:
    yes, no = [s for s, p in rows if p], [s for s, p in rows if not p]
    scores, positive = np.array([s for s, _ in rows]), np.array([p for _, p in rows], dtype=bool)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in yes for b in no]
    assert auc(scores, positive) == (pytest.approx(np.mean(pairs)) if pairs else None)


def test_figures_of_two_and_three_classes() -> None:
    two = np.array([[0.8, 0.2], [0.4, 0.6], [0.3, 0.7]])
    labels = np.array([0, 0, 1])
    assert accuracy(two, labels) == pytest.approx(2 / 3)
    assert brier(two, labels) == pytest.approx((0.2**2 + 0.6**2 + 0.3**2) / 3)
    assert mean_auc(two, labels) == auc(two[:, 1], labels == 1) == 1
    three = np.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    assert brier(three, np.array([0, 2])) == pytest.approx((0.25 + 0.09 + 0.04 + 0.01 + 0.64 + 0.81) / 2)
    assert mean_auc(three, np.array([0, 2])) == pytest.approx((1 + 0) / 2)
    assert mean_auc(two, np.zeros(3, int)) is None


def test_figures_of_values() -> None:
    seen = np.array([1.0, 2, 3])
    assert r2(seen, seen) == 1
    assert r2(np.full(3, 2.0), seen) == 0
    assert rmse(seen + 2, seen) == 2
    assert r2(seen, np.full(3, 2.0)) is None
