"""Syzygy's files decoded whole: every value of a table in one numpy array, in the table's own order.

A file holds, for each part (file a to d of the leading pawn; one where there are no pawns) and side to move, the
order of its pieces, a canonical Huffman code, and blocks of compressed symbols; a symbol stands for a run of values,
as a tree of pairs. Blocks start afresh, so all are decoded at once, symbol by symbol.

    .rtbw   value of each position, -2 to 2, for both sides (for one where both have the same pieces). Where a capture
            is at least as good the stored value may be anything that is not better
    .rtbz   distance to zero, for one side of each part; only where the value is not a draw and no capture or pawn
            move decides it at once

Facts from the format that Ronald de Man published (see numbering.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.tasks.chess_endgames.numbering import Numbering, numbering

_VALUES, _DISTANCES = b"\x71\xe8\x23\x5d", b"\xd7\x66\x0c\xa5"
_SINGLE, _WIDE_MAP, _LOSS_IN_PLIES, _WIN_IN_PLIES, _MAPPED, _BLACK = 128, 16, 8, 4, 2, 1
_MAP_OF_VALUE = {-2: 1, -1: 3, 0: 0, 1: 2, 2: 0}
_LEAF = 0xFFF
_LONGEST_RUN = 256


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of a table for one side to move: its numbering and what is stored by place."""

    numbering: Numbering
    flags: int
    stored: npt.NDArray[np.uint16]
    maps: tuple[npt.NDArray[np.uint16], ...] = ()

    @property
    def black_to_move(self) -> bool:
        """Of a .rtbz: the side whose distances are stored."""
        return bool(self.flags & _BLACK)

    def distance(self, place: npt.NDArray[np.int64], wdl: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of a .rtbz: plies (not counting the one that zeroes) at `place`, where the value is `wdl`."""
        found = self.stored[place].astype(np.int64)
        for value, number in _MAP_OF_VALUE.items():
            chosen = np.flatnonzero(wdl == value)
            if self.flags & _MAPPED and value:
                found[chosen] = self.maps[number][found[chosen]]
            if not self.flags & {-2: _LOSS_IN_PLIES, 2: _WIN_IN_PLIES}.get(value, 0):
                found[chosen] *= 2  # counted in moves
        return found


@dataclass(frozen=True, kw_only=True)
class Table:
    """A decoded file: `parts[file of the leading pawn][side to move]`."""

    parts: tuple[tuple[Part, ...], ...]
    leading_pawns: int
    """The code of the leading colour's pawns, or 0 without pawns."""


@dataclass(frozen=True, kw_only=True)
class _Code:
    """A canonical Huffman code, and the pairs that its symbols stand for."""

    shortest: int
    lowest: npt.NDArray[np.int64]
    """The lowest symbol of each length of code, from `shortest` on."""
    symbols: npt.NDArray[np.int64]
    """[symbols, 2], left and right; a leaf's left is its value, its right _LEAF."""


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """What a part's header says of its values. Without a code all are `constant`."""

    flags: int
    constant: int = 0
    block_bytes: int = 0
    blocks: int = 0
    listed_blocks: int = 0
    indices: int = 0
    code: _Code | None = None


def read_table(path: Path) -> Table:
    """Decode a .rtbw or .rtbz. Raises DataError where it is not a whole one."""
    try:
        data = path.read_bytes()
        return _Reader(data, distances=path.suffix == ".rtbz", name=path.stem).table()
    except OSError as error:
        raise DataError(f"cannot read the Syzygy table {path}: {error.strerror or error}.") from None
    except (IndexError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(
            f"the Syzygy table {path} is broken or cut short ({error}): fetch it again."
        ) from None


class _Reader:
    def __init__(self, data: bytes, *, distances: bool, name: str) -> None:
        if data[:4] != (_DISTANCES if distances else _VALUES):
            raise ValueError("its first bytes are another file's")
        self.data = data
        self.at = 5
        self.distances = distances
        first, second = name.split("v")
        self.men = len(first) + len(second)
        lettered = [(letter, 1) for letter in first] + [(letter, 9) for letter in second]
        self.codes = sorted("PNBRQK".index(letter) + lowest for letter, lowest in lettered)
        self.pawns = (first.count("P"), second.count("P"))
        self.sides = 1 if distances or first == second else 2

    def table(self) -> Table:
        has_pawns = sum(self.pawns) > 0
        files = 4 if has_pawns else 1
        counts = [count for count in self.pawns if count]
        leading = (min(counts), max(counts) if len(counts) == 2 else 0) if has_pawns else (0, 0)
        numberings = [self._numberings(leading, file) for file in range(files)]
        self.at += self.at & 1
        packed = [[self._packed(one.size) for one in sides] for sides in numberings]
        maps = self._maps([sides[0].flags for sides in packed]) if self.distances else [()] * files
        flat = [(f, s) for f in range(files) for s in range(self.sides)]
        self.at += sum(6 * packed[f][s].indices for f, s in flat)
        sizes = {place: self._uint16s(packed[place[0]][place[1]].listed_blocks) for place in flat}
        stored = {}
        for f, s in flat:
            self.at = (self.at + 63) & ~63
            stored[f, s] = self._values(packed[f][s], sizes[f, s], numberings[f][s].size)
        parts = tuple(
            tuple(
                Part(numbering=numberings[f][s], flags=packed[f][s].flags, stored=stored[f, s], maps=maps[f])
                for s in range(self.sides)
            )
            for f in range(files)
        )
        return Table(parts=parts, leading_pawns=numberings[0][0].pieces[0] if has_pawns else 0)

    def _numberings(self, pawns: tuple[int, int], file: int) -> list[Numbering]:
        """Orders and pieces of one part: the low half of each byte is the first side's, the high the second's."""
        orders = 2 if pawns[1] else 1
        head = self._uint8s(orders + self.men)
        halves = [head & 15, head >> 4][: self.sides]
        if any(sorted(half[orders:].tolist()) != self.codes for half in halves):
            raise ValueError("it lists other pieces than its name")
        return [
            numbering(
                tuple(half[orders:].tolist()),
                pawns,
                (int(half[0]), int(half[1]) if orders == 2 else 15),
                file,
            )
            for half in halves
        ]

    def _packed(self, size: int) -> _Packed:
        flags, constant = self._uint8s(2).tolist()
        if flags & _SINGLE:
            return _Packed(flags=flags, constant=0 if self.distances else constant)
        self.at -= 1
        block_bits, index_bits, padding = self._uint8s(3).tolist()
        blocks = int.from_bytes(self._bytes(4), "little")
        longest, shortest = self._uint8s(2).tolist()
        lowest = self._uint16s(longest - shortest + 1).astype(np.int64)
        count = int(self._uint16s(1)[0])
        triples = self._uint8s(3 * count).reshape(count, 3).astype(np.int64)
        self.at += count & 1
        left = triples[:, 0] | (triples[:, 1] & 15) << 8
        right = triples[:, 1] >> 4 | triples[:, 2] << 4
        return _Packed(
            flags=flags,
            block_bytes=1 << block_bits,
            blocks=blocks,
            listed_blocks=blocks + padding,
            indices=(size + (1 << index_bits) - 1) >> index_bits,
            code=_Code(shortest=shortest, lowest=lowest, symbols=np.stack([left, right], axis=1)),
        )

    def _maps(self, flags: list[int]) -> list[tuple[npt.NDArray[np.uint16], ...]]:
        """By part, up to four lists that stored distances are looked up in; none where it is not mapped."""
        maps: list[tuple[npt.NDArray[np.uint16], ...]] = []
        for flag in flags:
            if not flag & _MAPPED:
                maps.append(())
            elif flag & _WIDE_MAP:
                self.at += self.at & 1
                maps.append(tuple(self._uint16s(int(self._uint16s(1)[0])) for _ in range(4)))
            else:
                maps.append(tuple(self._uint8s(int(self._uint8s(1)[0])).astype(np.uint16) for _ in range(4)))
        self.at += self.at & 1
        return maps

    def _values(self, packed: _Packed, sizes: npt.NDArray[np.uint16], size: int) -> npt.NDArray[np.uint16]:
        if packed.code is None:
            return np.full(size, packed.constant, dtype=np.uint16)
        blocks = self._bytes(packed.blocks * packed.block_bytes)
        values = _unpacked(packed.code, blocks, sizes[: packed.blocks].astype(np.int64) + 1)
        if len(values) < size:
            raise ValueError(f"{len(values)} values instead of {size}")
        return values[:size]

    def _bytes(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if len(found) < count:
            raise ValueError(f"it ends at byte {len(self.data)}")
        self.at += count
        return found

    def _uint8s(self, count: int) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self._bytes(count), dtype=np.uint8)

    def _uint16s(self, count: int) -> npt.NDArray[np.uint16]:
        return np.frombuffer(self._bytes(2 * count), dtype="<u2")


def _runs(symbols: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint16]]:
    """The values that each symbol stands for."""
    pairs = symbols.tolist()
    runs: list[npt.NDArray[np.uint16] | None] = [None] * len(pairs)

    def run(symbol: int) -> npt.NDArray[np.uint16]:
        known = runs[symbol]
        if known is None:
            left, right = pairs[symbol]
            leaf = right == _LEAF
            known = np.array([left], dtype=np.uint16) if leaf else np.concatenate([run(left), run(right)])
            if len(known) > _LONGEST_RUN:
                raise ValueError(f"a symbol stands for {len(known)} values")
            runs[symbol] = known
        return known

    return [run(symbol) for symbol in range(len(pairs))]


def _unpacked(code: _Code, blocks: bytes, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
    """The values of all blocks in order: `wanted[b]` of block b, whose last symbol may stand for more."""
    runs = _runs(code.symbols)
    lengths = np.array([len(run) for run in runs], dtype=np.int64)
    symbols, counts = _symbols(code, blocks, wanted, lengths)
    first = np.cumsum(lengths) - lengths
    ends = np.cumsum(counts)
    shift = first[symbols] - (ends - counts)
    return np.concatenate(runs)[np.repeat(shift, counts) + np.arange(int(ends[-1]))]


def _symbols(
    code: _Code, blocks: bytes, wanted: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The symbols of all blocks in order, and how many values of each count. All blocks take a step at once."""
    starts = _code_starts(code.lowest, code.shortest)
    ascending = starts[::-1].copy()
    windows = _windows(blocks)
    bits = np.arange(len(wanted), dtype=np.int64) * (8 * len(blocks) // len(wanted))
    left = wanted.copy()
    active = np.arange(len(wanted))
    steps = []
    while active.size:
        at = bits[active]
        window = windows[at >> 3] << (at & 7).astype(np.uint64)
        longer = len(starts) - np.searchsorted(ascending, window, side="right")
        length = longer + code.shortest
        offset = (window - starts[longer]) >> (64 - length).astype(np.uint64)
        symbol = code.lowest[longer] + offset.astype(np.int64)
        steps.append((active, symbol, np.minimum(lengths[symbol], left[active])))
        bits[active] += length
        left[active] -= lengths[symbol]
        active = active[left[active] > 0]
    rows, symbols, counts = (np.concatenate(fields) for fields in zip(*steps, strict=True))
    order = np.argsort(rows, kind="stable")
    return symbols[order], counts[order]


def _code_starts(lowest: npt.NDArray[np.int64], shortest: int) -> npt.NDArray[np.uint64]:
    """The smallest code of each length, in the highest bits of 64; longer codes are smaller."""
    base = 0
    starts = [0] * len(lowest)
    for number in range(len(lowest) - 2, -1, -1):
        base = (base + int(lowest[number]) - int(lowest[number + 1])) // 2
        starts[number] = base
    return np.array([start << (64 - shortest - n) for n, start in enumerate(starts)], dtype=np.uint64)


def _windows(blocks: bytes) -> npt.NDArray[np.uint64]:
    """At each byte, the 64 bits that begin there, first bit highest."""
    padded = np.frombuffer(blocks + bytes(8), dtype=np.uint8).astype(np.uint64)
    windows = np.zeros(len(blocks) + 1, dtype=np.uint64)
    for number in range(8):
        windows |= padded[number : number + len(windows)] << np.uint64(56 - 8 * number)
    return windows
