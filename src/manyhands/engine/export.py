"""A checkpoint for other programs: an ONNX graph, or the weights alone as safetensors.

An ONNX file is not written before onnxruntime has given the same outputs as torch, at the example's shapes and at
others, so that an axis that is said to be free is free. With fp16 weights and computation are in half precision, and
the comparison is still with torch in fp32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file

from manyhands.config.extras import optional
from manyhands.errors import DataError, StorageError
from manyhands.tasks.protocol import Saved

EXTRA: Final = "onnx"
TOLERANCE: Final = {False: 1e-3, True: 3e-2}
"""Largest difference from torch in fp32, as a share of the largest output: by whether it is fp16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """`difference`: the largest between onnxruntime's outputs and torch's in fp32; `largest`: of torch's; of ONNX."""

    file: Path
    size_bytes: int
    difference: float | None = None
    largest: float | None = None


def export_safetensors(saved: Saved, file: Path, *, half: bool = False) -> Exported:
    """Write the model's parameters by name, in fp32 or fp16; tied ones once. Raises StorageError."""
    weights = {name: parameter.detach() for name, parameter in saved.model.named_parameters()}
    kept = {name: (w.half() if half and w.is_floating_point() else w) for name, w in weights.items()}
    aside = _aside(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: w.contiguous() for name, w in kept.items()}, aside, metadata={"format": "pt"})
        aside.replace(file)
    except OSError as error:
        raise StorageError(f"{file}: {error}; choose another --output") from error
    finally:
        aside.unlink(missing_ok=True)
    return Exported(file=file, size_bytes=file.stat().st_size)


def export_onnx(saved: Saved, file: Path, *, half: bool = False) -> Exported:
    """Write an ONNX graph of `saved.call` with its free axes, after comparing it with torch. `saved.model` becomes
    half precision where that is asked for.

    Weights of more than 2 GB lie beside it, in `<file>.data`. Raises MissingExtra, DataError for a model that cannot
    be traced or whose graph computes something else, StorageError.
    """
    runtime = _packages()
    asked = [dict(saved.inputs), _other_shapes(saved)]
    expected = [_expected(saved, inputs) for inputs in asked]
    if half:
        saved.call.half()
        asked = [{name: _as_half(value) for name, value in inputs.items()} for inputs in asked]
    program = _traced(saved, asked[0])
    aside = _aside(file)
    beside = aside.with_name(f"{aside.name}.data")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        program.save(str(aside))
        difference, largest = _compared(runtime, aside, saved.outputs, asked, expected, half=half)
        if beside.exists():  # the graph names the file beside it
            aside.unlink()
            beside.unlink()
            program.save(str(file))
        else:
            aside.replace(file)
    except OSError as error:
        raise StorageError(f"{file}: {error}; choose another --output") from error
    finally:
        aside.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
    size = sum(f.stat().st_size for f in (file, file.with_name(f"{file.name}.data")) if f.exists())
    return Exported(file=file, size_bytes=size, difference=difference, largest=largest)


def _packages() -> ModuleType:
    for name in ("onnx", "onnxscript"):
        optional(name, extra=EXTRA, option="--to onnx")
    return optional("onnxruntime", extra=EXTRA, option="--to onnx")


def _expected(saved: Saved, inputs: Mapping[str, torch.Tensor]) -> list[npt.NDArray[np.float32]]:
    try:
        with torch.inference_mode():
            outputs: torch.Tensor | tuple[torch.Tensor, ...] = saved.call(**inputs)
        several = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        return [output.float().numpy() for output in several]
    except Exception as error:  # the boundary to a user's own model
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        raise DataError(
            f"the model does not run at {shapes}: {' '.join(str(error).split())[:300]}; name only axes that it "
            "leaves free"
        ) from error


def _traced(saved: Saved, inputs: Mapping[str, torch.Tensor]) -> Any:
    try:
        with _quiet():
            return torch.onnx.export(
                saved.call,
                (),
                kwargs=dict(inputs),
                dynamo=True,
                dynamic_shapes={name: dict(saved.axes.get(name, {})) for name in inputs},
                output_names=list(saved.outputs),
                verbose=False,
            )
    except Exception as error:  # of torch.export and of any operator of a user's own model
        reason = " ".join(str(error).split())[:400]
        raise DataError(
            f"the model cannot be traced by torch.onnx.export: {reason}; --to safetensors needs no graph"
        ) from error


def _compared(
    runtime: ModuleType,
    file: Path,
    names: Sequence[str],
    asked: Sequence[Mapping[str, torch.Tensor]],
    expected: Sequence[Sequence[npt.NDArray[np.float32]]],
    *,
    half: bool,
) -> tuple[float, float]:
    """The largest difference and the largest output. Raises DataError where an output differs too much, as a share of
    its largest.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it does not precompute in half precision
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    taken = {
        entry.name for entry in session.get_inputs()
    }  # an input that changes nothing is not in the graph
    difference, largest = [0.0] * len(names), [0.0] * len(names)
    for inputs, wanted in zip(asked, expected, strict=True):
        given = {name: value.numpy() for name, value in inputs.items() if name in taken}
        try:
            got = session.run(list(names), given)
        except Exception as error:  # onnxruntime has no exceptions of its own to name
            shapes = {name: tuple(value.shape) for name, value in inputs.items()}
            raise DataError(
                f"the graph does not run at {shapes}: {' '.join(str(error).split())[:300]}; name only axes that the "
                "model leaves free"
            ) from error
        for i, (ours, theirs) in enumerate(zip(wanted, got, strict=True)):
            difference[i] = float(np.maximum(difference[i], np.abs(theirs.astype(np.float32) - ours).max()))
            largest[i] = max(largest[i], float(np.abs(ours).max()))
    for name, far, size in zip(names, difference, largest, strict=True):
        allowed = TOLERANCE[half] * max(size, 1e-6)
        if not far <= allowed:  # a difference that is no number is too large as well
            raise DataError(
                f"the ONNX graph's {name} differs from torch by {far:.3g}, more than {allowed:.3g} at outputs up to "
                f"{size:.3g}: nothing was written" + ("; export without --fp16" if half else "")
            )
    return max(difference), max(largest)


def _other_shapes(saved: Saved) -> dict[str, torch.Tensor]:
    """The example with one more along each free axis; the same name is the same size everywhere."""
    grown = {}
    for name, value in saved.inputs.items():
        for axis in saved.axes.get(name, {}):
            value = torch.cat([value, value.narrow(axis, 0, 1)], dim=axis)
        grown[name] = value
    return grown


def _as_half(value: torch.Tensor) -> torch.Tensor:
    return value.half() if value.is_floating_point() else value


def _aside(file: Path) -> Path:
    return file.with_name(f".{file.name}.partial-{os.getpid()}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch tells its progress on both streams, and what of torchvision is not installed."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        exporter.setLevel(level)
