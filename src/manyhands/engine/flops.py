"""How much a step computes, counted by torch on the model itself, so that no task has to know it."""

from __future__ import annotations

import copy
from itertools import chain

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from manyhands.tasks.protocol import Task


def training_flops(task: Task, model: torch.nn.Module) -> int | None:
    """FLOPs of the forward and backward pass of one sample: matrix products, convolutions and attention.

    Counted on tensors without contents (torch's fake tensors), so that it takes no memory and next to no time,
    whatever the model's size; None for a model whose way depends on contents. Activation checkpointing is not in it,
    by MFU's definition.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    batch = {
        name: fake.from_tensor(tensor) for name, tensor in task.batch(np.zeros(1, dtype=np.int64)).items()
    }
    empty = _without_contents(model, fake)
    try:
        with fake, FlopCounterMode(display=False) as counter:
            task.loss(empty, batch).mean.backward()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - of any model and task; the training itself says what is wrong with one
        return None
    return int(counter.get_total_flops())


def _without_contents(model: torch.nn.Module, fake: FakeTensorMode) -> torch.nn.Module:
    """A copy of the model in which parameters and buffers are fake."""
    empty: dict[int, object] = {}
    for tensor in chain(model.parameters(), model.buffers()):
        shape = fake.from_tensor(tensor.detach())
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        empty[id(tensor)] = torch.nn.Parameter(shape, tensor.requires_grad) if is_parameter else shape
    return copy.deepcopy(model, empty)
