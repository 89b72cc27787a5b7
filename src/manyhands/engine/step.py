"""The training step: the one place where a gradient is computed, corrected, clipped and applied.

Everything that trains goes through `training_step`: `manyhands train`, a client's round of any preset, a
replay. What differs between them is in its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from manyhands.engine.gradients import clip, divide, global_norm
from manyhands.engine.parallel import Parallelized
from manyhands.engine.precision import computing_in
from manyhands.engine.settings import Precision
from manyhands.engine.world import ALONE, Summing, World
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
    """What a step did. `loss` (0-d, on the device, before the step) is read later: reading it waits for the device.

    Both are of all data ranks together, alike on each.
    """

    loss: torch.Tensor
    count: int  # of what the loss is a mean over, on this rank
    gradient_norm: torch.Tensor | None  # before clipping; None where clipping is off
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)  # of the loss, as it itself
    skipped: bool = False  # not finite, and left out


def training_step(
    task: Task,
    model: Parallelized,
    micro_batches: Iterable[Batch],
    *,
    optimizer: torch.optim.Optimizer | None,
    learning_rate: float = 0.0,
    steering: Steering = Steering(),
    world: World = ALONE,
    precision: Precision = "fp32",
    reference_count: int | None = None,
    fp32_sum: bool = False,
    skip_nonfinite: bool = False,
    abandoned: Callable[[], bool] = lambda: False,
) -> Step:
    """One optimizer step on the mean loss over all `micro_batches` of all data ranks, in place.

    Without an optimizer it stops at the mean gradient, which is left in `.grad`. Each micro-batch weighs by its
    count; a single one of a process alone is not rescaled, so it gives bit for bit what the bare backward pass gives.

    reference_count: a count that all data ranks name alike, such as that of a full micro-batch; needed with several.
    fp32_sum: sum the gradients of several micro-batches in fp32 where they are bf16. skip_nonfinite: leave the
    weights untouched, on every rank, when loss or gradient norm is not finite; this waits for the device. Raises
    Abandoned between two micro-batches; the weights are then untouched.
    """
    for parameter in model.trained:
        parameter.grad = None
    seen = _backward(task, model, micro_batches, world, precision, reference_count, fp32_sum, abandoned)
    loss, parts, share = _mean_loss(seen, world.data_size)
    parameters = model.trained
    # A parameter without a gradient took no part in this loss.
    if not (isinstance(share, float) and share == 1.0):  # the sum of micro-batches becomes their mean
        divide([p.grad for p in parameters if p.grad is not None], share)
    _steer(parameters, steering)

    gradient_norm = None
    if optimizer is not None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        if steering.clip_norm > 0 or skip_nonfinite:
            gradient_norm = global_norm(gradients)
        if skip_nonfinite and not _finite(loss, gradient_norm):
            return Step(loss=loss, count=seen.count, gradient_norm=gradient_norm, parts=parts, skipped=True)
        if gradient_norm is not None and steering.clip_norm > 0:
            clip(gradients, gradient_norm, steering.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    return Step(loss=loss, count=seen.count, gradient_norm=gradient_norm, parts=parts)


@dataclass(slots=True)
class _Seen:
    """Sums over this rank's micro-batches. A share is a count over the reference count."""

    losses: torch.Tensor  # 0-d, each loss times its share
    parts: dict[str, torch.Tensor] = field(default_factory=dict)  # likewise
    shares: float = 0.0
    count: int = 0
    over_data: Summing | None = None  # with several data ranks: losses, shares and parts over all of them


def _backward(
    task: Task,
    model: Parallelized,
    micro_batches: Iterable[Batch],
    world: World,
    precision: Precision,
    reference_count: int | None,
    fp32_sum: bool,
    abandoned: Callable[[], bool],
) -> _Seen:
    """Leave in `.grad` the sum of the micro-batches' gradients, each times its share; the mean over data ranks of
    these sums where there are several.
    """
    seen = _Seen(torch.zeros((), device=world.device))
    sums = _Fp32Sums(model.model) if fp32_sum else None
    for micro_batch, last in _with_last(micro_batches):
        if abandoned():
            raise Abandoned
        batch = {name: tensor.to(world.device, non_blocking=True) for name, tensor in micro_batch.items()}
        with model.synchronizing(last or sums is not None):
            with computing_in(precision, world.device):
                loss = task.loss(model.forward, batch)
            reference_count = reference_count or loss.count
            share = (
                loss.count / reference_count if loss.count else 0.0
            )  # 1.0 for a single one: it is not rounded
            seen.losses += loss.mean.detach().float() * share
            for name, part in loss.parts.items():
                seen.parts[name] = seen.parts.get(name, 0.0) + part.detach().float() * share
            seen.shares += share
            seen.count += loss.count
            if last and world.data_size > 1:  # they travel while the backward pass computes
                shares = torch.full_like(seen.losses, seen.shares)
                seen.over_data = world.start_sum_over_data(
                    torch.stack([seen.losses, shares, *seen.parts.values()])
                )
            (loss.mean if share == 1.0 else loss.mean * share).backward()  # type: ignore[no-untyped-call]
        if sums is not None:
            sums.take(last)
    return seen


def _mean_loss(
    seen: _Seen, data_size: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor | float]:
    """The mean loss over all data ranks and its parts, and the mean over them of the sum of shares."""
    if seen.over_data is None:
        divisor = seen.shares or 1.0
        return seen.losses / divisor, {name: part / divisor for name, part in seen.parts.items()}, divisor
    losses, shares, *parts = seen.over_data()
    shares = torch.where(shares > 0, shares, 1.0)
    means = {name: part / shares for name, part in zip(seen.parts, parts, strict=True)}
    return losses / shares, means, shares / data_size


def _steer(parameters: Sequence[torch.nn.Parameter], steering: Steering) -> None:
    for i, parameter in enumerate(parameters):
        if parameter.grad is None:
            continue
        if steering.anchor is not None:
            parameter.grad.add_(parameter.detach() - steering.anchor[i], alpha=steering.proximal)
        if steering.correction is not None:
            parameter.grad.add_(steering.correction[i])


def _finite(loss: torch.Tensor, norm: torch.Tensor | None) -> bool:
    total = loss if norm is None else loss + norm.to(loss.dtype)
    return bool(torch.isfinite(total))


def _with_last(batches: Iterable[Batch]) -> Iterator[tuple[Batch, bool]]:
    """Each micro-batch, and whether it is the last; one is made ahead, no more."""
    iterator = iter(batches)
    ahead = next(iterator, None)
    while ahead is not None:
        batch, ahead = ahead, next(iterator, None)
        yield batch, ahead is None


class _Fp32Sums:
    """Gradients summed in fp32 over micro-batches, for a model whose own are bf16."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._sums: list[torch.Tensor | None] = [None] * len(self._parameters)

    def take(self, last: bool) -> None:
        """Add what the last backward pass left in `.grad`, and clear it; the last time, put the sum there."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                before = self._sums[i]
                self._sums[i] = parameter.grad.float() if before is None else before.add_(parameter.grad)
                parameter.grad = None
            total = self._sums[i]
            if last and total is not None:
                parameter.grad = total.to(parameter.dtype)
