"""The training step: the one place where a gradient is computed, corrected, clipped and applied.

Everything that trains goes through `training_step`: `manyhands train`, a client's round of any preset, a
replay. What differs between them is in its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from manyhands.engine.device import CPU
from manyhands.engine.precision import Precision, computing_in
from manyhands.tasks.protocol import Batch, Task
from manyhands.updates.types import Abandoned


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What a method adds to plain descent. `correction` and `anchor` are like the trainable parameters, in
    order.
    """

    clip_norm: float = 0.0  # largest global gradient norm; 0: no clipping
    correction: Sequence[torch.Tensor] | None = None  # added to every gradient: SCAFFOLD's c - c_k
    anchor: Sequence[torch.Tensor] | None = None  # FedProx: the weights at the start of the work
    proximal: float = 0.0  # FedProx's mu


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step did. `loss` (0-d, on the device, before the step) is read later: reading it waits for the
    device.
    """

    loss: torch.Tensor
    count: int  # of what the loss is a mean over
    gradient_norm: torch.Tensor | None  # before clipping; None where clipping is off


def training_step(
    task: Task,
    model: torch.nn.Module,
    micro_batches: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer | None,
    learning_rate: float = 0.0,
    steering: Steering = Steering(),
    device: torch.device = CPU,
    precision: Precision = "fp32",
    abandoned: Callable[[], bool] = lambda: False,
) -> Step:
    """One optimizer step on the mean loss over all `micro_batches`, in place.

    Without an optimizer it stops at the mean gradient, which is left in `.grad`. Each micro-batch weighs by
    its count; a single one is not rescaled, so it gives bit for bit what the bare backward pass gives.
    Raises Abandoned between two micro-batches; the weights are then untouched.
    """
    model.zero_grad(set_to_none=True)
    loss_sum, shares, count, first_count = torch.zeros((), device=device), 0.0, 0, 0
    for micro_batch in micro_batches:
        if abandoned():
            raise Abandoned
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in micro_batch.items()}
        with computing_in(precision, device):
            loss = task.loss(model, batch)
        first_count = first_count or loss.count
        share = loss.count / first_count  # 1.0 for the first, so a single one is not rounded
        (loss.mean * share).backward()  # type: ignore[no-untyped-call]
        loss_sum += loss.mean.detach().float() * share
        shares += share
        count += loss.count

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for i, parameter in enumerate(parameters):
        if parameter.grad is None:  # it took no part in this loss
            continue
        if shares != 1.0:  # the sum of micro-batches becomes their mean
            parameter.grad.div_(shares)
        if steering.anchor is not None:
            parameter.grad.add_(parameter.detach() - steering.anchor[i], alpha=steering.proximal)
        if steering.correction is not None:
            parameter.grad.add_(steering.correction[i])

    gradient_norm = None
    if optimizer is not None:
        if steering.clip_norm > 0:
            gradient_norm = torch.nn.utils.clip_grad_norm_(parameters, steering.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return Step(loss=loss_sum / shares, count=count, gradient_norm=gradient_norm)
