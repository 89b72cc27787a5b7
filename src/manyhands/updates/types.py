"""The values that the five functions take and give: work, merge, advance, apply, adopt (functions.py).

Tensors of `public`, `outer` and merged sums are fp32 and contiguous. Functions never write into their arguments.
In programs without torch the same mappings hold numpy arrays; this module does not load torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from manyhands.coordination.types import Assignment, AssignmentId, RoundTerms
from manyhands.plan.wire import CONTROL, MAIN

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONTROL", "MAIN", "Abandoned", "Arrays", "Local", "Outer", "Pending", "Public", "Tensors", "Trained", "Trainer",
    "Update",
]  # fmt: skip

Tensors = Mapping[str, "torch.Tensor"]
"""By parameter name, on the CPU. numpy arrays in a program without torch."""
Arrays = Mapping[str, npt.NDArray[Any]]
"""By the name that a file uses: `<channel>/<parameter>` and so on (plan/wire.py). bf16 as uint16 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Public:
    """What everybody holds alike. `control` is SCAFFOLD's global control variate, else None."""

    weights: Tensors
    control: Tensors | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """The outer optimizer's state: `moments["momentum"]`, or `["first"]` and `["second"]`, each like the weights;
    `residual`: what the codec of the published change has lost so far (star, with error feedback)."""

    moments: Mapping[str, Tensors] = field(default_factory=dict)
    residual: Tensors | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """What was sent in one assignment and is not settled: to be restored bit for bit if it does not count."""

    assignment: AssignmentId
    feedback: Mapping[str, Tensors]  # by channel, as before the work
    control: Tensors | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """A client's own. A fresh one is `Local()`: zeros, and the inner optimizer from scratch.

    `weights`: None where the work starts from `public`, that is without lag.
    `inner`: the inner optimizer's state as flat named tensors, None before the first work.
    `after`: the assignment whose work made this state; "fresh" before the first.
    """

    weights: Tensors | None = None
    inner: Mapping[str, torch.Tensor] | None = None
    feedback: Mapping[str, Tensors] = field(default_factory=dict)
    control: Tensors | None = None
    pending: Mapping[int, Pending] = field(default_factory=dict)
    after: str = "fresh"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What a trainer did: end weights, or the mean gradient, and the inner optimizer's state behind it."""

    tensors: Tensors
    inner: Mapping[str, torch.Tensor] | None
    loss: float
    tokens: int
    samples: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What work sends: wire tensors in the plan's update schema; `norm` of the decoded main channel; and of what
    local state it was made: `start` is the assignment after which that was, or "fresh"."""

    tensors: Mapping[str, npt.NDArray[np.generic]]
    norm: float
    start: str
    loss: float
    tokens: int
    samples: int
    steps: int


class Abandoned(Exception):
    """Raised inside a trainer, between two micro-batches, when the work will not be counted."""


class Trainer(Protocol):
    """The part of work that runs a model. engine/ implements it; updates/ imports no engine."""

    def gradient(self, weights: Tensors, assignment: Assignment) -> Trained:
        """Mean gradient of the loss at `weights` over the assignment's samples."""
        ...

    def train(
        self,
        weights: Tensors,
        inner: Mapping[str, torch.Tensor] | None,
        assignment: Assignment,
        terms: RoundTerms,
        *,
        correction: Tensors | None = None,
        proximal: float = 0.0,
    ) -> Trained:
        """`assignment.steps` optimizer steps from `weights`, step i with terms.learning_rates[i].

        `correction` is added to every gradient (SCAFFOLD); `proximal` is FedProx's mu around the start weights.
        """
        ...
