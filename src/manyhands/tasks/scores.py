"""Figures of predictions against what was seen, over whole splits, in fp64.

Each is None where it is not defined (one class only, no comparable pair, a constant target): a figure that
cannot be computed is left out, not invented.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def accuracy(probabilities: Array, labels: Array) -> float | None:
    """Share of rows whose likeliest class is theirs. probabilities [N, C], labels int [N]."""
    return float((probabilities.argmax(axis=1) == labels).mean()) if len(labels) else None


def brier(probabilities: Array, labels: Array) -> float | None:
    """Brier's score: the mean squared error of the probabilities, summed over classes; of two classes, of the
    second one's alone, as is usual (half the sum). Brier 1950, "Verification of forecasts expressed in terms
    of probability".
    """
    if not len(labels):
        return None
    seen = np.eye(probabilities.shape[1])[labels]
    total = float(((probabilities.astype(np.float64) - seen) ** 2).sum(axis=1).mean())
    return total / 2 if probabilities.shape[1] == 2 else total


def auc(scores: Array, positive: Array) -> float | None:
    """The chance that a positive row scores higher than a negative one, ties counted half (Mann and Whitney).

    scores [N], positive bool [N].
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle_rank = (last - (counts - 1) / 2)[inverse]  # from 1, shared by those that are equal
    above = float(middle_rank[positive].sum()) - n_positive * (n_positive + 1) / 2
    return above / (n_positive * n_negative)


def mean_auc(probabilities: Array, labels: Array) -> float | None:
    """AUC of each class against the others, averaged over the classes that were seen; of two classes: the
    AUC.
    """
    found = [auc(probabilities[:, c], labels == c) for c in range(probabilities.shape[1])]
    defined = [value for value in found if value is not None]
    return float(np.mean(defined)) if defined else None


def r2(predictions: Array, targets: Array) -> float | None:
    """1 - residual sum of squares / that around the targets' mean."""
    around = float(((targets - targets.mean()) ** 2).sum()) if len(targets) else 0.0
    return 1 - float(((targets - predictions) ** 2).sum()) / around if around > 0 else None


def rmse(predictions: Array, targets: Array) -> float | None:
    """Root mean squared error, in the target's own unit."""
    return float(np.sqrt(((targets - predictions) ** 2).mean())) if len(targets) else None


def concordance_index(risks: Array, times: Array, events: Array) -> float | None:
    """Harrell's C: of the pairs whose order is known, the share in which who died first had the higher risk.

    risks, times, events (bool): [N]. A pair is comparable if the earlier time is an event, or if times are equal
    and just one of them is an event (the other outlived it). Equal risks count half. O(N log N) by a Fenwick
    tree over the ranks of risks. Harrell, Lee and Mark 1996, "Multivariable prognostic models".
    """
    ranks = np.unique(risks, return_inverse=True)[1] + 1  # 1-based, equal for equal risks
    outlived_by = _Counter(int(ranks.max(initial=0)))
    order = np.lexsort((events, -times))  # late first; at one time, the censored before the events
    concordant, pairs, start = 0.0, 0, 0
    events = events.astype(bool)
    while start < len(order):
        end = start
        while end < len(order) and times[order[end]] == times[order[start]]:
            end += 1
        now = order[start:end]
        for i in now[~events[now]]:
            outlived_by.add(int(ranks[i]))
        for i in now[events[now]]:
            lower, upto = outlived_by.up_to(int(ranks[i]) - 1), outlived_by.up_to(int(ranks[i]))
            concordant += lower + (upto - lower) / 2
            pairs += outlived_by.total
        for i in now[events[now]]:
            outlived_by.add(int(ranks[i]))
        start = end
    return concordant / pairs if pairs else None


class _Counter:
    """How many of what was added are up to a value from 1 to `size` (Fenwick 1994)."""

    def __init__(self, size: int) -> None:
        self._tree = [0] * (size + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.total += 1
        while value < len(self._tree):
            self._tree[value] += 1
            value += value & -value

    def up_to(self, value: int) -> int:
        count = 0
        while value > 0:
            count += self._tree[value]
            value -= value & -value
        return count
