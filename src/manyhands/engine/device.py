"""Which device computes, and with how many threads."""

from __future__ import annotations

import os

import torch

from manyhands.errors import WorkerError

CPU = torch.device("cpu")


def choose_device(name: str = "auto") -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N`. auto is the first CUDA device, else the CPU.

    Raises WorkerError for a device that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WorkerError(f"device {name!r} is not known; give auto, cpu or cuda:N") from error
    if device.type == "cpu":
        return CPU
    if device.type != "cuda":
        raise WorkerError(f"device {name!r} is not supported; give auto, cpu or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        there = f"cuda:0 to cuda:{count - 1}" if count else "none"
        raise WorkerError(f"device {name!r} is not on this machine (CUDA devices: {there}); give auto or cpu")
    return torch.device("cuda", index)


def share_threads(count: int | None, processes: int) -> int:
    """As `use_threads`; None: this process's share of the CPU among `processes` of this machine."""
    if count is None and processes > 1:
        count = max(1, (os.cpu_count() or 1) // processes)
    return use_threads(count)


def use_threads(count: int | None) -> int:
    """Let torch compute with `count` CPU threads (None: as many as it chose); returns how many it uses.

    Sums depend on it in their last bits, so it is part of a contribution's claims and of a replay.
    """
    if count is not None:
        if count < 1:
            raise WorkerError(f"{count} threads: give at least 1")
        torch.set_num_threads(count)
    return torch.get_num_threads()
