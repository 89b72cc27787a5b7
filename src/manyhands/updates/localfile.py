"""A client's local state on disk: one safetensors file with a JSON header, nothing pickled.

Names: `inner/<key>`, `feedback/<channel>/<parameter>`, `control/<parameter>`, and the same two under
`pending/<round>/`. What is not a tensor is in the header's metadata. Written aside, on disk, renamed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import StorageError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.wire import TensorSpec
from manyhands.updates import tensorfile
from manyhands.updates.codecs import NUMPY
from manyhands.updates.types import Local, Pending, Tensors
from manyhands.updates.views import as_array, as_given, as_tensors

_VERSION = 1
_KEY = "manyhands.local"
_CODES = {np.dtype(dtype): code for code, dtype in NUMPY.items() if code != "BF16"}


def save_local(local: Local, path: Path) -> None:
    """Write the state; `path` has the old one or the new one at any moment. Raises StorageError.

    Live weights are not written: without lag they are public's.
    """
    tensors: dict[str, Any] = {f"inner/{key}": tensor for key, tensor in (local.inner or {}).items()}
    tensors |= _state("", local.feedback, local.control)
    for number, pending in local.pending.items():
        tensors |= _state(f"pending/{number}/", pending.feedback, pending.control)
    header = {
        "version": _VERSION,
        "after": local.after,
        "inner": local.inner is not None,
        "control": local.control is not None,
        "feedback": sorted(local.feedback),
        "pending": {
            str(number): {
                "assignment": pending.assignment,
                "control": pending.control is not None,
                "feedback": sorted(pending.feedback),
            }
            for number, pending in local.pending.items()
        },
    }
    coded = {name: _coded(tensor) for name, tensor in tensors.items()}
    schema: dict[str, TensorSpec] = {name: (code, array.shape) for name, (code, array) in coded.items()}
    try:
        with tensorfile.written(path, schema, {_KEY: json.dumps(header, sort_keys=True)}) as out:
            for name, (_, array) in coded.items():
                np.copyto(out[name], array)
    except OSError as error:
        raise StorageError(f"cannot save local state to {path}: {error}") from None


def load_local(path: Path, parameters: Sequence[Parameter], *, arrays: bool = False) -> Local:
    """What `save_local` wrote, tensors on the CPU (`arrays`: as numpy arrays). Raises StorageError.

    Shapes must be those of the parameter table: the state of another run is refused.
    """
    file = tensorfile.open_own(path, private=True)
    try:
        header = json.loads(file.metadata[_KEY])
        if header["version"] != _VERSION:
            raise StorageError(f"{path} has version {header['version']}; expected {_VERSION}")
        held = _Held(file.arrays, file.codes, {p.name: p.shape for p in parameters}, arrays)
        return Local(
            inner=held.tensors("inner/") if header["inner"] else None,
            feedback={channel: held.shaped(f"feedback/{channel}/") for channel in header["feedback"]},
            control=held.shaped("control/") if header["control"] else None,
            pending={
                int(number): Pending(
                    assignment=str(entry["assignment"]),
                    feedback={c: held.shaped(f"pending/{number}/feedback/{c}/") for c in entry["feedback"]},
                    control=held.shaped(f"pending/{number}/control/") if entry["control"] else None,
                )
                for number, entry in header["pending"].items()
            },
            after=str(header["after"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(
            f"{path} is not a client's local state ({type(error).__name__}: {error}); "
            "move it away and the client starts with a fresh one"
        ) from None


def _state(prefix: str, feedback: Mapping[str, Tensors], control: Tensors | None) -> dict[str, Any]:
    tensors: dict[str, Any] = {f"{prefix}control/{name}": tensor for name, tensor in (control or {}).items()}
    for channel, held in feedback.items():
        tensors |= {f"{prefix}feedback/{channel}/{name}": tensor for name, tensor in held.items()}
    return tensors


def _coded(tensor: Any) -> tuple[str, npt.NDArray[Any]]:
    """safetensors' name of the dtype, and the values; bf16 as its bits."""
    if str(getattr(tensor, "dtype", "")) == "torch.bfloat16":
        import torch

        return "BF16", as_array(tensor.detach().view(torch.int16)).view(np.uint16)
    array = as_array(tensor)
    if array.dtype not in _CODES:
        raise StorageError(f"local state holds a tensor of {array.dtype}, which a safetensors file cannot")
    return _CODES[array.dtype], array


class _Held:
    """The tensors of a file by prefix."""

    def __init__(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        codes: Mapping[str, str],
        shapes: Mapping[str, tuple[int, ...]],
        as_they_are: bool,
    ) -> None:
        self._arrays, self._codes, self._shapes, self._as_they_are = arrays, codes, shapes, as_they_are

    def tensors(self, prefix: str) -> Tensors:
        found = {n.removeprefix(prefix): a for n, a in self._arrays.items() if n.startswith(prefix)}
        if self._as_they_are:
            return as_given(found)
        halves = [name for name in found if self._codes[prefix + name] == "BF16"]
        made = dict(as_tensors({n: a.view(np.int16) if n in halves else a for n, a in found.items()}))
        if halves:
            import torch

            made |= {name: made[name].view(torch.bfloat16) for name in halves}
        return made

    def shaped(self, prefix: str) -> Tensors:
        """fp32 tensors that must be shaped like the parameters."""
        for name, array in self._arrays.items():
            if name.startswith(prefix):
                expected = self._shapes[name.removeprefix(prefix)]
                if array.shape != expected or array.dtype != np.float32:
                    raise ValueError(f"'{name}' is {array.dtype} {array.shape}; expected float32 {expected}")
        return self.tensors(prefix)
