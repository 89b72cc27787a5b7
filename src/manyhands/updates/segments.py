"""Long arrays in pieces that stay in the cache, on several threads, with the same bits for any size and number.

Every piece is computed from and into its own part of the arrays, elementwise; so neither the length of a piece nor
the thread that takes it can change a result.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Codec as CodecSettings
from manyhands.updates.codecs import Wire, codec_of
from manyhands.updates.exact import F32, require_subnormals

SEGMENT = 1 << 18
"""Elements of a piece, about: 1 MiB of fp32."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, stop) of one flattened parameter; `start` is a multiple of the codec's block."""

    name: str
    start: int
    stop: int

    def of(self, array: F32) -> F32:
        """This part of a contiguous array, flat, as a view."""
        assert array.flags.c_contiguous, "reshape would copy, and what is written would be lost"
        return array.reshape(-1)[self.start : self.stop]

    def wire(self, arrays: Mapping[str, npt.NDArray[Any]], channel: str, codec: CodecSettings) -> Wire:
        """This part of the wire tensors `<channel>/<name><suffix>`, flat, as views, by suffix."""
        parts = codec_of(codec).parts(self.start, self.stop, codec)
        return {
            suffix: arrays[f"{channel}/{self.name}{suffix}"].reshape(-1)[p] for suffix, p in parts.items()
        }


def segments(parameters: Sequence[Parameter], codec: CodecSettings, length: int = SEGMENT) -> list[Segment]:
    """All of the given parameters in pieces of about `length` elements, cut between blocks of the codec."""
    unit = codec.block if codec.name == "int8" else 1
    step = max(1, length // unit) * unit
    found = []
    for parameter in parameters:
        size = math.prod(parameter.shape)
        found += [Segment(parameter.name, start, min(start + step, size)) for start in range(0, size, step)]
    return found


def default_threads() -> int:
    """The cores that this process may use, at most 8: beyond that memory is the limit."""
    return max(
        1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    )


def for_each(
    pieces: Sequence[Segment], work: Callable[[Segment, F32], Result], threads: int, *, rows: int = 0
) -> list[Result]:
    """`work(piece, scratch)` of every piece, in the order of the pieces.

    `scratch` is the thread's own, fp32 (rows, length of the longest piece), with anything in it. An exception is
    raised once every thread has stopped. numpy's floating-point warnings are off inside: what is not finite is
    found by checks.
    """
    threads = max(1, min(threads, len(pieces)))
    longest = max((piece.stop - piece.start for piece in pieces), default=0)

    def share(number: int) -> list[Result]:
        scratch = np.empty((rows, longest), dtype=np.float32)
        with np.errstate(all="ignore"):
            require_subnormals()
            first, last = (len(pieces) * n // threads for n in (number, number + 1))
            return [work(piece, scratch) for piece in pieces[first:last]]

    if threads == 1:
        return share(0)
    with ThreadPoolExecutor(threads) as pool:
        return [result for results in pool.map(share, range(threads)) for result in results]
