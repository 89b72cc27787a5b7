"""A tensor that several processes hold in parts, and the whole of it. Plain tensors pass through."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part; a change of it in place is one of the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every process; all of them have to call this."""
    if not isinstance(tensor, DTensor):
        return tensor
    with _unadvised():
        return tensor.full_tensor()


def like(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values`, which every process has whole, on the device of `parameter` and in parts as that is."""
    values = values.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextmanager
def _unadvised() -> Iterator[None]:
    """torch warns, once and on each rank, that parts which lie on two dimensions of the mesh are gathered along one
    after the other: the order in which FSDP2 shards what tensor parallelism has divided leaves no other way.
    """
    adviser = logging.getLogger("torch.distributed.tensor._redistribute")
    level = adviser.level
    adviser.setLevel(logging.ERROR)
    try:
        yield
    finally:
        adviser.setLevel(level)
