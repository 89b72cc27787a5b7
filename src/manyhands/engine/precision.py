"""In which precision a model computes: its forward pass; weights, gradients and optimizer state are fp32, except with
pure_bf16, which casts the model itself.

A choice of the machine, not of the plan: local work need not be exact, and what leaves it is fp32 or
encoded by the plan's codec. A replay of recorded work must use the precision of the work.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from manyhands.engine.settings import Precision


def computing_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: autocast for bf16, where reductions and the loss stay fp32."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
