"""What the ranks of one training tell each other beside tensors: plain data as JSON, arrays as numpy writes them.

Nothing that comes from another process is unpickled here. Every rank of the group calls the same function at the same
time; the tensors that carry the bytes are on the CPU.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def as_json(value: Any) -> bytes:
    """Plain data, floats exact, NaN and infinities included; tuples become lists."""
    return json.dumps(value).encode()


def broadcast(value: Any, *, leads: bool) -> Any:
    """Rank 0's plain data, on every rank of the default group."""
    size = torch.zeros(1, dtype=torch.int64)
    data = _tensor(as_json(value)) if leads else torch.empty(0, dtype=torch.uint8)
    size[0] = data.numel()
    dist.broadcast(size, src=0)
    if not leads:
        data = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, src=0)
    return json.loads(data.numpy().tobytes())


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Each rank's plain data, in their order."""
    return [json.loads(data) for data in _gather_bytes(as_json(value), group)]


def gather_arrays(arrays: Mapping[str, np.ndarray], group: dist.ProcessGroup) -> list[dict[str, np.ndarray]]:
    """Each rank's arrays, in their order."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return [_arrays(data) for data in _gather_bytes(file.getvalue(), group)]


def _arrays(data: bytes) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def _gather_bytes(data: bytes, group: dist.ProcessGroup) -> list[bytes]:
    ranks = group.size()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]
    dist.all_gather(sizes, torch.tensor([len(data)]), group=group)
    longest = int(max(sizes))
    padded = _tensor(data.ljust(longest, b"\0"))
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return [part.numpy().tobytes()[: int(size)] for part, size in zip(parts, sizes, strict=True)]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy())
