"""Exact arithmetic: the fingerprint of `public`, and the rules under which fp32 gives the same bits everywhere.

Everything between agreed bytes and `public` is made of separate elementwise IEEE operations on fp32 (add, subtract,
multiply, divide, square root), one array operation each, so that no compiler fuses two of them. They are numpy's:
no BLAS, no thread pool, no reduction, nothing that depends on the instruction set. Scalars are rounded to fp32
once, by `single`, before they meet an array. Subnormal numbers are kept; `require_subnormals` refuses to compute
in a thread that flushes them to zero.

The fingerprint is integer arithmetic modulo 2^64 and therefore exact in any order (conformance vectors and the
definition: tests/updates/make_vectors.py). It finds drift; it is no proof against liars.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
import numpy.typing as npt

from manyhands.errors import WorkerError

F32 = npt.NDArray[np.float32]
U64 = npt.NDArray[np.uint64]

BLOCK_BYTES: Final = 4 << 20
"""Of the fingerprint; the last block is short."""
_BLOCK = BLOCK_BYTES // 4
_CHUNK = 1 << 15  # elements at a time: bits, factors and products stay in the second-level cache


def single(number: float) -> np.float32:
    """A constant of the arithmetic, rounded to fp32 once, to nearest even."""
    return np.float32(number)


def require_subnormals() -> None:
    """Raise WorkerError when this thread flushes subnormal numbers to zero, as results or as operands.

    The mode belongs to the thread. torch.set_flush_denormal(True) sets it, and so do libraries linked with
    -ffast-math when they are loaded.
    """
    smallest_normal = np.full(16, 2.0**-126, dtype=np.float32)
    halves = np.multiply(smallest_normal, np.float32(0.5))
    if not (np.add(halves, halves) == smallest_normal).all() or np.count_nonzero(halves) != halves.size:
        raise WorkerError(
            "this thread flushes subnormal floating-point numbers to zero, so its results would differ from "
            "everybody else's; expected gradual underflow: call torch.set_flush_denormal(False), and look for a "
            "library built with -ffast-math"
        )


# ------------------------------------------------------------------------------------------ fingerprint
@dataclass(frozen=True, slots=True)
class Fingerprint:
    """`blocks`: one sum for each 4 MiB, to find where two differ; `hex`: SHA-256 of them, 64 hex digits."""

    blocks: tuple[int, ...]
    hex: str


def fingerprint(tensors: Mapping[str, npt.NDArray[np.generic]], *, threads: int = 1) -> Fingerprint:
    """The fingerprint of fp32 tensors: little-endian, sorted by name, concatenated, in blocks of 4 MiB.

    Tensors that are not contiguous are copied, one at a time; nothing else is.
    """
    pieces = _pieces(_bits(tensors[name]) for name in sorted(tensors))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            partial = list(pool.map(_piece_sum, pieces))
    else:
        partial = [_piece_sum(piece) for piece in pieces]
    sums: list[int] = []
    for block, part in partial:
        if block == len(sums):
            sums.append(0)
        sums[block] = (sums[block] + part) % 2**64
    digest = hashlib.sha256(b"".join(total.to_bytes(8, "little") for total in sums))
    return Fingerprint(tuple(sums), digest.hexdigest())


def _bits(tensor: npt.NDArray[np.generic]) -> npt.NDArray[np.uint32]:
    if tensor.dtype != np.float32:
        raise TypeError(f"a fingerprint is of fp32 tensors; got {tensor.dtype}")
    return np.ascontiguousarray(tensor, dtype="<f4").reshape(-1).view("<u4")


def _pieces(
    tensors: Iterable[npt.NDArray[np.uint32]],
) -> Iterable[tuple[int, int, npt.NDArray[np.uint32]]]:
    """The concatenation cut at blocks and at tensors: (block, position of the first element in it, bits)."""
    position = 0
    for bits in tensors:
        taken = 0
        while taken < bits.size:
            block, within = divmod(position, _BLOCK)
            part = bits[taken : taken + _BLOCK - within]
            yield block, within, part
            taken += part.size
            position += part.size


def _piece_sum(piece: tuple[int, int, npt.NDArray[np.uint32]]) -> tuple[int, int]:
    block, within, bits = piece
    factors = _factors()
    total = 0
    wide = np.empty(min(_CHUNK, bits.size), dtype=np.uint64)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        products = wide[: part.size]
        np.copyto(products, part)
        np.multiply(products, factors[within + start : within + start + part.size], out=products)
        total += int(np.add.reduce(products))
    return block, total % 2**64


@cache
def _factors() -> U64:
    """k_i = splitmix64(i) | 1 for each position i of a block (Steele, Lea, Flood 2014; constants by Vigna)."""
    z = np.arange(_BLOCK, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)
