"""How much a step computes, counted by torch on the model itself, so that no task has to know it."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyhands.tasks.protocol import Task


def training_flops(task: Task, model: torch.nn.Module, device: torch.device) -> int:
    """FLOPs of the forward and backward pass of one sample: matrix products, convolutions and attention.

    The model's gradients are cleared afterwards. Activation checkpointing is not in it, by MFU's definition.
    """
    batch = {name: tensor.to(device) for name, tensor in task.batch(np.zeros(1, dtype=np.int64)).items()}
    with FlopCounterMode(display=False) as counter:
        task.loss(model, batch).mean.backward()  # type: ignore[no-untyped-call]
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())
