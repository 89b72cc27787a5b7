"""`public` and `outer` as named arrays and as files.

A snapshot holds every parameter under its name and the control variate under `control/`; in a mesh also the outer
optimizer's state under `outer/`, once there is any. Its data are the bytes that two fingerprints cover, one what is
under `outer/` and the other the rest, so equal states give equal files. First weights may come without a control
variate: it is zero then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from manyhands.coordination.types import Held
from manyhands.errors import UpdateError
from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates import tensorfile
from manyhands.updates.exact import F32, Fingerprint, fingerprint
from manyhands.updates.outer import fresh_outer
from manyhands.updates.segments import default_threads
from manyhands.updates.tensorfile import Arrays
from manyhands.updates.types import Outer, Public
from manyhands.updates.views import as_arrays, as_given

_CONTROL = f"{wire.CONTROL}/"
_OUTER = f"{wire.OUTER}/"
_RESIDUAL = f"{wire.OUTER}/{wire.RESIDUAL}/"


# ------------------------------------------------------------------------------------------ names
def public_arrays(public: Public) -> dict[str, F32]:
    """`public` by the names of a snapshot."""
    arrays = as_arrays(public.weights)
    for name, control in as_arrays(public.control or {}).items():
        arrays[_CONTROL + name] = control
    return arrays


def outer_arrays(outer: Outer) -> dict[str, F32]:
    """Outer state by the names of a file; empty for a fresh one."""
    arrays = {
        f"{_OUTER}{moment}/{name}": array
        for moment, tensors in outer.moments.items()
        for name, array in as_arrays(tensors).items()
    }
    return arrays | {_RESIDUAL + name: array for name, array in as_arrays(outer.residual or {}).items()}


def public_of(arrays: Mapping[str, F32]) -> Public:
    """From the names of a snapshot; names under `outer/` are left out. The values stay arrays."""
    weights = {n: a for n, a in arrays.items() if not n.startswith((_CONTROL, _OUTER))}
    control = {n.removeprefix(_CONTROL): a for n, a in arrays.items() if n.startswith(_CONTROL)}
    return Public(weights=as_given(weights), control=as_given(control) if control else None)


def outer_of(arrays: Mapping[str, F32]) -> Outer:
    """From the names of a file; other names are left out. The residual keeps `<channel>/<parameter>`."""
    moments: dict[str, dict[str, F32]] = {}
    residual = {n.removeprefix(_RESIDUAL): a for n, a in arrays.items() if n.startswith(_RESIDUAL)}
    for name, array in arrays.items():
        if name.startswith(_OUTER) and not name.startswith(_RESIDUAL):
            _, moment, parameter = name.split("/", 2)
            moments.setdefault(moment, {})[parameter] = array
    return Outer(
        moments={moment: as_given(tensors) for moment, tensors in moments.items()},
        residual=as_given(residual) if residual else None,
    )


# ------------------------------------------------------------------------------------------ files
def load_arrays(path: Path, plan: Plan, parameters: Sequence[Parameter]) -> dict[str, F32]:
    """A snapshot's arrays, writable and private to this process; a missing control variate is zeros.

    Raises UpdateError when the file is not a snapshot of this plan.
    """
    with open_snapshot(path, plan, parameters) as file:
        arrays = file.arrays
    return complete(arrays, plan, parameters)


def open_snapshot(path: Path, plan: Plan, parameters: Sequence[Parameter]) -> tensorfile.TensorFile:
    """The file as it is, its header checked, mapped privately: without control variate or outer state if it has
    none. Raises UpdateError.
    """
    whole = wire.snapshot_schema(plan, parameters, outer=True)
    try:
        names = wire.parse_header(path, limit_bytes=4 * len(wire.encode_header(whole)) + 4096).tensors
    except OSError as error:
        raise UpdateError(f"cannot read the snapshot {path}: {error}") from None
    parts = [part for part in (_CONTROL, _OUTER) if not any(name.startswith(part) for name in names)]
    schema = {name: spec for name, spec in whole.items() if not name.startswith(tuple(parts))}
    return tensorfile.open_checked(path, schema, private=True, metadata=True)


def complete(arrays: Mapping[str, F32], plan: Plan, parameters: Sequence[Parameter]) -> dict[str, F32]:
    """`arrays` and zeros for a control variate that it lacks."""
    schema = wire.snapshot_schema(plan, parameters)
    missing = [name for name in schema if name.startswith(_CONTROL) and name not in arrays]
    return {**arrays, **{name: np.zeros(schema[name][1], np.float32) for name in missing}}


def complete_outer(outer: Outer, plan: Plan, parameters: Sequence[Parameter]) -> dict[str, F32]:
    """Outer state by the names of a file, zeros where it is fresh."""
    return fresh_outer(plan, parameters) | outer_arrays(outer)


def save_arrays(arrays: Arrays, path: Path) -> None:
    """Write fp32 arrays as a snapshot: aside, on disk, renamed. Equal arrays give equal bytes."""
    with tensorfile.written(path, {name: ("F32", array.shape) for name, array in arrays.items()}) as out:
        for name, array in arrays.items():
            np.copyto(out[name], array)


def fingerprint_of(arrays: Arrays, *, threads: int | None = None) -> Fingerprint:
    """Of `public`, by the names of a snapshot; outer state is not covered."""
    covered = {name: array for name, array in arrays.items() if not name.startswith(_OUTER)}
    return fingerprint(covered, threads=threads or default_threads())


def held_by(arrays: Arrays) -> Held:
    """Both fingerprints of a snapshot's arrays."""
    outer = {name: array for name, array in arrays.items() if name.startswith(_OUTER)}
    return Held(
        fingerprint_of(arrays).hex, fingerprint(outer, threads=default_threads()).hex if outer else None
    )


def load_held(path: Path, plan: Plan, parameters: Sequence[Parameter], expected: Held) -> dict[str, F32]:
    """`load_arrays` of a snapshot that must hold this. Raises UpdateError, saying which of the two differs."""
    arrays = load_arrays(path, plan, parameters)
    for what, has, should in zip(("public", "outer state"), held_by(arrays), expected, strict=True):
        if has != should:
            raise UpdateError(
                f"{path} is not the snapshot that it is said to be: the fingerprint of its {what} is {_short(has)}, "
                f"expected {_short(should)}"
            )
    return arrays


def _short(fingerprint_hex: str | None) -> str:
    return "none" if fingerprint_hex is None else f"{fingerprint_hex[:16]}..."
