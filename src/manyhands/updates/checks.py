"""What must hold for an update's values before any of them is added: finite, and of the norm that was claimed.

Two checks, each one pass over the decoded values:

- `check_values`, before an update is agreed on, by the aggregator or a witness. Finiteness comes from each piece's
  sum of squares, which is what the norm needs anyway; only a piece whose sum is not finite is looked at value by
  value. Norms are compared to one part in a thousand and feed no weight, so their rounding does not matter.
- `check_bounds`, by everybody who merges what is agreed on. No sum, only comparisons, so that every machine finds the
  same: a norm at the edge may be above it here and below it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from manyhands.errors import UpdateError
from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Codec, Plan
from manyhands.updates import tensorfile
from manyhands.updates.codecs import codec_of
from manyhands.updates.exact import F32
from manyhands.updates.segments import Segment, default_threads, for_each, segments

LARGEST: Final = 2.0**60
"""Of a value, and of a channel's norm. Squares, and sums of 2^20 updates with weights below 2^31, then stay finite in
fp32."""
NORM_TOLERANCE: Final = 1e-3
"""Of a claimed norm, relative."""
_ROW = 1024


class Unsound(UpdateError):
    """Values that nobody may merge; the same on every machine."""


def check_update(
    plan: Plan,
    parameters: Sequence[Parameter],
    path: Path,
    claimed_norm: float | None,
    *,
    threads: int | None = None,
) -> float:
    """Check a whole update file, header and values; the L2 norm of its decoded main channel.

    Raises UpdateError naming the tensor and the position that is wrong, or the norm that was claimed in vain.
    """
    with tensorfile.open_checked(path, wire.update_schema(plan, parameters)) as file:
        return check_values(plan, parameters, file.arrays, claimed_norm, where=str(path), threads=threads)


def check_values(
    plan: Plan,
    parameters: Sequence[Parameter],
    arrays: Mapping[str, npt.NDArray[Any]],
    claimed_norm: float | None,
    *,
    where: str = "the update",
    threads: int | None = None,
) -> float:
    """Check wire tensors whose names, dtypes and shapes are known to be right; the norm of the main channel."""
    norms = norms_of(plan.codec, wire.channels(plan), parameters, arrays, where=where, threads=threads)
    norm = norms[wire.MAIN]
    if claimed_norm is not None and not (
        math.isfinite(claimed_norm) and abs(norm - claimed_norm) <= NORM_TOLERANCE * claimed_norm
    ):
        raise UpdateError(
            f"{where}: the norm is {norm:.6g} but {claimed_norm:.6g} was claimed; expected agreement to 0.1%"
        )
    return norm


def check_bounds(
    plan: Plan,
    parameters: Sequence[Parameter],
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    where: str = "the update",
    threads: int | None = None,
) -> None:
    """Every decoded value of every channel is finite and at most LARGEST, exactly. Raises Unsound."""
    pieces = segments(wire.trainable(parameters), plan.codec)
    for channel in wire.channels(plan):

        def check(piece: Segment, scratch: F32, channel: str = channel) -> None:
            values = decoded(piece, arrays, channel, plan.codec, scratch[0])
            sizes = np.abs(values, out=scratch[1][: values.size])
            if not sizes.max() <= LARGEST:  # so written that NaN is found
                at = int(np.flatnonzero(~(sizes <= LARGEST))[0])
                raise Unsound(
                    f"{where}: '{channel}/{piece.name}' is {values[at]} at position {piece.start + at}; "
                    "expected finite values of at most 2^60"
                )

        if plan.codec.name == "int8":
            _check_scales(parameters, arrays, channel, where)
        for_each(pieces, check, threads or default_threads(), rows=2)


def norms_of(
    codec: Codec,
    channels: Sequence[str],
    parameters: Sequence[Parameter],
    arrays: Mapping[str, npt.NDArray[Any]],
    *,
    where: str,
    threads: int | None = None,
) -> dict[str, float]:
    """The L2 norm of each channel, decoded; UpdateError for values that are not finite or too large."""
    pieces = segments(wire.trainable(parameters), codec)
    norms = {}
    for channel in channels:

        def squares(piece: Segment, scratch: F32, channel: str = channel) -> float:
            values = decoded(piece, arrays, channel, codec, scratch[0])
            return _checked_squares(values, f"{where}: '{channel}/{piece.name}'", piece.start)

        if codec.name == "int8":
            _check_scales(parameters, arrays, channel, where)
        rows = for_each(pieces, squares, threads or default_threads(), rows=1)
        norms[channel] = math.sqrt(math.fsum(rows))
        if norms[channel] > LARGEST:
            raise UpdateError(
                f"{where}: the norm of '{channel}' is {norms[channel]:.3g}; expected 2^60 at most"
            )
    return norms


def decoded(
    piece: Segment, arrays: Mapping[str, npt.NDArray[Any]], channel: str, codec: Codec, scratch: F32
) -> F32:
    """The fp32 values of a piece: for fp32 the file's own memory, else decoded into `scratch`."""
    parts = piece.wire(arrays, channel, codec)
    if codec.name == "fp32":
        return parts[""]
    values = scratch[: piece.stop - piece.start]
    codec_of(codec).decode(parts, codec, values)
    return values


def _checked_squares(values: F32, where: str, start: int) -> float:
    """Sum of squares; UpdateError naming the first value that is not finite, `start` being the piece's place."""
    total = _squares(values)
    if math.isfinite(total):
        return total
    wrong = np.flatnonzero(~np.isfinite(values))
    if wrong.size:
        at = int(wrong[0])
        raise UpdateError(f"{where} is {values[at]} at position {start + at}; expected finite values")
    return _squares(values.astype(np.float64))  # only its squares overflow fp32


def _squares(values: npt.NDArray[Any]) -> float:
    """Sums of rows of 1024 in the array's precision, then of the rows in fp64. Not BLAS: no thread pool."""
    whole = values.size // _ROW * _ROW
    rows = values[:whole].reshape(-1, _ROW)
    rest = values[whole:]
    return float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64)) + float(
        np.einsum("i,i->", rest, rest)
    )


def _check_scales(
    parameters: Sequence[Parameter], arrays: Mapping[str, npt.NDArray[Any]], channel: str, where: str
) -> None:
    for parameter in wire.trainable(parameters):
        name = f"{channel}/{parameter.name}.scale"
        scale = arrays[name]
        wrong = np.flatnonzero(~(np.isfinite(scale) & (scale >= 0)))
        if wrong.size:
            at = int(wrong[0])
            raise Unsound(
                f"{where}: '{name}' is {scale[at]} at position {at}; expected finite and not negative"
            )
