"""Merging: the weighted mean of updates, added one by one in the published order, in constant memory.

The arithmetic (vectors: tests/updates/make_vectors.py): sum = sum + ((x * factor) * weight) for each update, one
division by the sum of the integer weights at the end. The control channel is divided by the number of clients of
the round instead (SCAFFOLD's N, 1910.06378), each with weight one. Anonymous memory is one fp32 model for each
channel and a few pieces; updates are read where they lie, in mapped files.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.errors import UpdateError
from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates import tensorfile
from manyhands.updates.checks import check_bounds, check_values, decoded
from manyhands.updates.codecs import NUMPY
from manyhands.updates.exact import F32, single
from manyhands.updates.segments import SEGMENT, Segment, default_threads, for_each, segments
from manyhands.updates.tensorfile import TensorFile

LARGEST_WEIGHT = 2**31
"""Weights are below this (checks.LARGEST)."""


class Merger:
    """The sum of a round's updates so far. An update is checked as a whole before any of it is added: with `check`,
    norm and all, by whoever decides whether it is to count; in `add` exactly, where that has been decided.

    Not for several threads at once; `threads` of its own work on each update. Results do not depend on `threads`
    or `segment` (elements of a piece).
    """

    def __init__(
        self,
        plan: Plan,
        parameters: Sequence[Parameter],
        *,
        threads: int | None = None,
        segment: int = SEGMENT,
    ) -> None:
        self._plan, self._parameters = plan, parameters
        self._schema = wire.update_schema(plan, parameters)
        self._threads = threads or default_threads()
        self._pieces = segments(wire.trainable(parameters), plan.codec, segment)
        self._sums = {channel: self._zeros() for channel in wire.channels(plan)}
        self._checked: tuple[Path, TensorFile] | None = None
        self.weight = 0
        """Sum of the weights added."""
        self.count = 0
        """Updates added."""

    def check(self, path: Path, claimed_norm: float | None = None) -> float:
        """Read an update once, header and values; the norm of its main channel. Raises UpdateError."""
        self._forget()
        file = tensorfile.open_checked(path, self._schema)
        try:
            norm = self.check_arrays(file.arrays, claimed_norm, where=str(path))
        except BaseException:
            file.close()
            raise
        self._checked = (path, file)
        return norm

    def add(self, path: Path, weight: int, factor: float = 1.0) -> None:
        """Add an update. Raises UpdateError; of values it looks at what every machine sees alike (`check_bounds`),
        and then it is Unsound. One that was the last to be checked is not looked at again.
        """
        _check_terms(weight, factor)
        if self._checked is not None and self._checked[0] == path:
            self._add(self._checked[1].arrays, weight, factor)
        else:
            with tensorfile.open_checked(path, self._schema) as file:
                self.add_arrays(file.arrays, weight, factor, where=str(path))
        self._forget()

    def check_arrays(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        claimed_norm: float | None = None,
        *,
        where: str = "the update",
    ) -> float:
        """As `check`, for wire tensors in memory; it does not spare `add_arrays` anything."""
        _check_schema(arrays, self._schema, where)
        return check_values(
            self._plan, self._parameters, arrays, claimed_norm, where=where, threads=self._threads
        )

    def add_arrays(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        weight: int,
        factor: float = 1.0,
        *,
        where: str = "the update",
    ) -> None:
        """As `add`, for wire tensors in memory."""
        _check_terms(weight, factor)
        _check_schema(arrays, self._schema, where)
        check_bounds(self._plan, self._parameters, arrays, where=where, threads=self._threads)
        self._add(arrays, weight, factor)

    def _add(self, arrays: Mapping[str, npt.NDArray[Any]], weight: int, factor: float) -> None:
        for channel, sums in self._sums.items():
            self._add_channel(
                arrays, channel, sums, single(factor), single(weight if channel == wire.MAIN else 1)
            )
        self.weight += weight
        self.count += 1

    def merged(self, *, clients: int | None = None) -> dict[str, F32]:
        """The mean, by `<channel>/<parameter>`: the sums themselves, divided in place. `clear` before the next add.

        `clients` is the divisor of the control channel: None stands for the number of updates added.
        """
        if not self.count:
            raise UpdateError(
                "nothing was added, so there is no mean; a round without counted updates has no change"
            )
        if clients is not None and clients < self.count:
            raise UpdateError(f"the round has {clients} clients but {self.count} updates were added")
        result: dict[str, F32] = {}
        for channel, sums in self._sums.items():
            divisor = single(self.weight if channel == wire.MAIN else clients or self.count)

            def divide(
                piece: Segment, _: F32, sums: dict[str, F32] = sums, divisor: np.float32 = divisor
            ) -> None:
                part = piece.of(sums[piece.name])
                np.divide(part, divisor, out=part)

            for_each(self._pieces, divide, self._threads)
            result |= {f"{channel}/{name}": total for name, total in sums.items()}
        return result

    def clear(self) -> None:
        """Start the next round in the same memory."""
        for sums in self._sums.values():
            for total in sums.values():
                total.fill(0)
        self.weight = self.count = 0

    def close(self) -> None:
        """Let go of the last checked file."""
        self._forget()

    def _add_channel(
        self,
        arrays: Mapping[str, npt.NDArray[Any]],
        channel: str,
        sums: dict[str, F32],
        factor: np.float32,
        weight: np.float32,
    ) -> None:
        def add(piece: Segment, scratch: F32) -> None:
            values = decoded(piece, arrays, channel, self._plan.codec, scratch[0])
            product = scratch[1][: values.size]
            for scalar in (factor, weight):
                if scalar != 1:  # multiplying by one changes no bit of a finite value
                    np.multiply(values, scalar, out=product)
                    values = product
            total = piece.of(sums[piece.name])
            np.add(total, values, out=total)

        for_each(self._pieces, add, self._threads, rows=2)

    def _zeros(self) -> dict[str, F32]:
        """One model of anonymous memory, by parameter."""
        travelling = wire.trainable(self._parameters)
        flat = _anonymous_zeros(sum(math.prod(p.shape) for p in travelling))
        found: dict[str, F32] = {}
        position = 0
        for p in travelling:
            size = math.prod(p.shape)
            found[p.name] = flat[position : position + size].reshape(p.shape)
            position += size
        return found

    def _forget(self) -> None:
        if self._checked is not None:
            self._checked[1].close()
            self._checked = None


def _anonymous_zeros(size: int) -> F32:
    """Zeros in huge pages where the system has them, touched now: else the first update would pay for it, and in
    small pages more than for its merge.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(1, size) * np.dtype(np.float32).itemsize, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    zeros = np.frombuffer(memory, dtype=np.float32)[:size]
    zeros.fill(0)
    return zeros


def _check_terms(weight: int, factor: float) -> None:
    if not 1 <= weight < LARGEST_WEIGHT:
        raise UpdateError(f"the weight of an update is {weight}; expected 1 to 2^31 - 1")
    if not 0 < factor <= 1:
        raise UpdateError(f"the factor of an update is {factor}; expected more than 0, at most 1")


def _check_schema(arrays: Mapping[str, npt.NDArray[Any]], schema: wire.Schema, where: str) -> None:
    if arrays.keys() != schema.keys():
        raise UpdateError(
            f"{where} has tensors {sorted(arrays.keys() - schema.keys())[:3]} too many and lacks "
            f"{sorted(schema.keys() - arrays.keys())[:3]}"
        )
    for name, (dtype, shape) in schema.items():
        array = arrays[name]
        if array.shape != shape or array.dtype != np.dtype(NUMPY[dtype]):
            raise UpdateError(f"{where}: '{name}' is {array.dtype} {array.shape}; expected {dtype} {shape}")
