"""In which precision a model computes. Weights, gradients and optimizer state are fp32 in all of them.

A choice of the machine, not of the plan: local work need not be exact, and what leaves it is fp32 or
encoded by the plan's codec. A replay of recorded work must use the precision of the work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]
"""fp32: everything; bf16: matrix products and attention under autocast, reductions and the loss in fp32."""


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
