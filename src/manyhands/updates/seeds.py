"""Seeds of the global generators: the same work gives the same numbers, on any client and rank."""

from __future__ import annotations

import random

import numpy as np


def seed_generators(seed: int, *, torch_free: bool = False) -> None:
    """Seed Python's, numpy's and torch's global generators (the CPU's, and the GPUs' that are in use).

    torch.manual_seed would also keep a seed and a traceback for GPUs that nothing uses: 0.7 ms after a step.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch_free:
        return
    import torch

    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)


def seed_of(*numbers: int) -> int:
    """A seed in [0, 2^63) that these numbers determine, such as a run's, a step's and a rank's."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
