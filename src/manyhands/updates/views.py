"""Between torch tensors, which trainers use, and numpy arrays, in which the arithmetic is done, without copies.

A program without torch keeps arrays throughout: every function gives back the kind that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from manyhands.updates.exact import F32
from manyhands.updates.types import Tensors


def as_array(tensor: Any) -> npt.NDArray[Any]:
    """The same memory as numpy sees it; a tensor on a device, or one that is not contiguous, is copied."""
    if isinstance(tensor, np.ndarray):
        return tensor
    return cast("npt.NDArray[Any]", tensor.detach().cpu().contiguous().numpy())


def as_arrays(tensors: Tensors) -> dict[str, F32]:
    """fp32 arrays by name. Raises TypeError for another dtype: masters are fp32."""
    arrays = {name: np.ascontiguousarray(as_array(tensor)) for name, tensor in tensors.items()}
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise TypeError(
                f"tensor '{name}' is {array.dtype}; expected float32: masters and deltas are fp32"
            )
    return arrays


def as_tensors(arrays: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """torch tensors over the same memory. Loads torch."""
    import torch

    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def as_given(arrays: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    """Arrays as they are, under the type that functions give back."""
    return cast("Tensors", arrays)


def like(tensors: Tensors) -> Callable[[Mapping[str, npt.NDArray[Any]]], Tensors]:
    """What turns arrays into the kind that `tensors` is of."""
    held = next(iter(tensors.values()), None)
    return as_given if isinstance(held, np.ndarray) else as_tensors
