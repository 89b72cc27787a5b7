"""A seeded shuffle of range(total) that needs no memory: position -> sample index, one permutation per epoch.

Why: the coordinator hands out ranges of positions, and every client must find the same samples behind them
without holding a shuffled list of a data set that may have billions of samples.

How: a balanced Feistel network over the smallest domain of 2^(2h) >= total values, whose rounds are
splitmix64 of the half and a round key. A value that falls outside range(total) is sent through the network
again until it falls inside (cycle walking), fewer than four times on average. A Feistel network is a
bijection whatever its round function is, and walking along its cycles keeps it one.

Integer arithmetic only, so it is identical on every machine; the golden values in the tests guard the format:
a change here changes the order of data of every run.

Sources: Luby and Rackoff 1988 (the network); Black and Rogaway 2002, "Ciphers with arbitrary finite domains"
(cycle walking); Steele, Lea and Flood 2014 (splitmix64's finalizer).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]

ROUNDS = 6
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def permute(positions: Int64s, total: int, seed: int, epoch: int) -> Int64s:
    """The samples at `positions` (int64, any shape, each in [0, total)) of epoch `epoch`'s permutation.

    Returns int64 of the same shape. O(1) memory beside its argument. Raises ValueError for a position
    outside.
    """
    if total < 1:
        raise ValueError(f"total is {total}: a permutation needs at least one sample")
    flat = np.ascontiguousarray(positions, dtype=np.int64).reshape(-1)
    if flat.size and (int(flat.min()) < 0 or int(flat.max()) >= total):
        raise ValueError(f"positions {flat.min()}..{flat.max()} are not all within [0, {total})")
    half_bits = max(1, ((total - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = _feistel(flat.astype(np.uint64), half_bits, keys)
    outside = np.flatnonzero(values >= np.uint64(total))
    while outside.size:
        walked = _feistel(values[outside], half_bits, keys)
        values[outside] = walked
        outside = outside[walked >= np.uint64(total)]
    return values.astype(np.int64).reshape(np.shape(positions))


def splitmix64(value: int) -> int:
    """The 64-bit finalizer of splitmix64 of one integer, after adding its gamma."""
    z = (value + _GAMMA) & _MASK
    z = ((z ^ (z >> 30)) * _MULTIPLIER_1) & _MASK
    z = ((z ^ (z >> 27)) * _MULTIPLIER_2) & _MASK
    return z ^ (z >> 31)


def _round_keys(seed: int, epoch: int) -> list[int]:
    state = splitmix64(splitmix64(seed & _MASK) ^ (epoch & _MASK))
    keys = []
    for _ in range(ROUNDS):
        state = splitmix64(state)
        keys.append(state)
    return keys


def _feistel(values: UInt64s, half_bits: int, keys: list[int]) -> UInt64s:
    """One pass of the network over [0, 2^(2 * half_bits))."""
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + np.uint64(key)) & mask)
    return (left << shift) | right


def _mix(z: UInt64s) -> UInt64s:
    """splitmix64's finalizer of each element; products wrap modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MULTIPLIER_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MULTIPLIER_2)
    return z ^ (z >> np.uint64(31))
