"""Gradients after the backward pass: their mean, their norm and their clipping, also where they are sharded.

A parameter may be a plain tensor or a DTensor on any part of the mesh. Everything here works on local shards; only
norms are exchanged, one number for each way of sharding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from manyhands.engine.sharding import local

Sharding = tuple[dist.ProcessGroup, ...]


def divide(gradients: Iterable[torch.Tensor], divisor: torch.Tensor | float) -> None:
    """In place. The divisor is a number, or a 0-d tensor on the gradients' device."""
    shards = [local(gradient) for gradient in gradients]
    if shards:
        torch._foreach_div_(shards, divisor)


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm over all gradients of the whole model, 0-d fp32, alike on every rank."""
    if not any(isinstance(gradient, DTensor) for gradient in gradients):
        if len({(gradient.device, gradient.dtype) for gradient in gradients}) != 1:
            return torch.nn.utils.get_total_norm(gradients)
        # the same numbers; to sort the tensors first takes a fifth of the time
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients))))
        return norm
    sums: dict[Sharding, list[torch.Tensor]] = {}
    for gradient in gradients:
        sums.setdefault(_sharding(gradient), []).append(local(gradient).float().square().sum())
    squares = []
    for groups, parts in sums.items():
        square = torch.stack(parts).sum()
        for group in groups:
            dist.all_reduce(square, group=group)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def clip(gradients: Sequence[torch.Tensor], norm: torch.Tensor, largest: float) -> None:
    """Multiply by min(1, largest / (norm + 1e-6)), in place: bit for bit what torch's clip_grad_norm_ does."""
    factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], factor)


def _sharding(tensor: torch.Tensor) -> Sharding:
    """The process groups over which a tensor is divided; none where every rank holds the whole."""
    if not isinstance(tensor, DTensor):
        return ()
    mesh = tensor.device_mesh
    dimensions = [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return tuple(mesh.get_group(i) for i in dimensions)
