"""Row groups of a set, decompressed, in a bounded piece of memory; and the next ones, decompressed ahead by a thread.

Memory does not depend on the size of the shards: a slab of `slots` row groups, allocated once, from which any rows
are gathered by one indexing operation for each column, and the groups that were decompressed ahead. A request that
needs more groups than there are slots is served in pieces.

Reading checks what is cheap to check: the checksum of each page, rows and widths. What fails names file and group.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from manyhands.data.shards.manifest import Column, ShardSet
from manyhands.data.shards.writer import arrow, parquet
from manyhands.errors import DataError

Int64s = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

SLOTS_OF_EVALUATION: Final = 4
"""Evaluations read each set from its beginning to its end."""


class BrokenShards(DataError):
    """A file that is not as the manifest says, and behind it what a training does about that."""

    def __init__(self, fault: str, advice: str) -> None:
        super().__init__(fault, advice)
        self.fault, self.advice = fault, advice

    def __str__(self) -> str:
        return f"shards: {self.fault}{self.advice}"


class DecodedGroups:
    """The row groups of one set. Its methods may be called by several threads; one of them works at a time."""

    def __init__(self, directory: Path, part: ShardSet, slots: int) -> None:
        self._directory, self._part = directory, part
        self._where = [(file, i) for file in part.files for i in range(len(file.groups))]
        self.rows = [file.groups[i].rows for file, i in self._where]
        self._first: Int64s = np.concatenate([[0], np.cumsum(self.rows)]).astype(np.int64)
        self._stored = part.stored()
        self._slots = min(slots, len(self._where))
        self._stride = max(self.rows)
        self._slab: Arrays = {}
        self._held: OrderedDict[int, int] = OrderedDict()  # group -> slot, the one used last at the end
        self._slot_of = np.full(len(self._where), -1, dtype=np.int64)
        self._ahead: dict[int, Future[Arrays]] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._lock = threading.RLock()

    def gather(self, rows: Int64s) -> Arrays:
        """These rows (int64 [n], each within the set), by column: new arrays [n, *shape] of the column's dtype."""
        out = {c.name: np.empty((len(rows), *c.shape), dtype=c.dtype) for c in self._part.columns}
        group = np.searchsorted(self._first, rows, side="right") - 1
        needed = np.unique(group)
        with self._lock:
            for start in range(0, len(needed), self._slots):
                some = needed[start : start + self._slots]
                self._hold(some.tolist())
                if len(some) == len(needed):
                    self._copy(rows, group, out, slice(None))
                else:
                    self._copy(rows, group, out, np.flatnonzero(np.isin(group, some)))
        return out

    def move(self, now: Sequence[int], following: Sequence[int]) -> None:
        """Hold the groups `now`, and begin to decompress `following`; forget what else was begun."""
        with self._lock:
            self._hold(list(now))
            for future in self._ahead.values():
                future.cancel()
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
            self._ahead = {
                number: self._thread.submit(self._decode, number)
                for number in following
                if number not in self._held
            }

    def close(self) -> None:
        """End the thread; what is held stays readable."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
        self._ahead.clear()

    def _copy(self, rows: Int64s, group: Int64s, out: Arrays, which: Any) -> None:
        chosen = group[which]
        place = self._slot_of[chosen] * self._stride + rows[which] - self._first[chosen]
        for name, slab in self._slab.items():
            out[name][which] = slab[place]

    def _hold(self, groups: list[int]) -> None:
        for number in groups:
            if number in self._held:
                self._held.move_to_end(number)
        for number in groups:
            if number not in self._held:
                self._put(number, self._decoded(number))

    def _put(self, number: int, arrays: Arrays) -> None:
        if not self._slab:
            self._slab = {
                c.name: np.empty((self._slots * self._stride, *c.shape), dtype=self._stored[c.name])
                for c in self._part.columns
            }
        if len(self._held) < self._slots:
            slot = len(self._held)
        else:
            gone, slot = self._held.popitem(last=False)
            self._slot_of[gone] = -1
        for name, values in arrays.items():
            self._slab[name][slot * self._stride : slot * self._stride + len(values)] = values
        self._held[number] = slot
        self._slot_of[number] = slot

    def _decoded(self, number: int) -> Arrays:
        future = self._ahead.pop(number, None)
        return self._decode(number) if future is None else future.result()

    def _decode(self, number: int) -> Arrays:
        file, group = self._where[number]
        arrays = read_group(self._directory / file.name, self._part.columns, file.stored, group)
        if any(len(values) != file.groups[group].rows for values in arrays.values()):
            raise _broken(self._directory / file.name, group, "it has not the rows that the manifest says")
        return arrays


def read_group(path: Path, columns: Sequence[Column], stored: dict[str, Any], group: int) -> Arrays:
    """A row group as it is stored, by column. Raises DataError, naming file and group, for one that is broken."""
    pa, pq = arrow(), parquet()
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as opened:
            table = opened.read_row_group(group, columns=[c.name for c in columns], use_threads=False)
            return {c.name: _values(table.column(c.name), c, np.dtype(stored[c.name])) for c in columns}
    except FileNotFoundError:
        raise DataError(
            f"shards: {path} is gone since they were opened; put it back, or make the shards again"
        ) from None
    except (OSError, ValueError, KeyError, MemoryError, pa.ArrowException) as error:
        raise _broken(path, group, " ".join(str(error).split())[:200]) from error


def _values(column: Any, what: Column, stored: np.dtype[Any]) -> npt.NDArray[Any]:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if array.null_count:
        raise ValueError(f"column {what.name!r} has nulls")
    width = int(stored.itemsize * np.prod(what.shape, dtype=np.int64))
    if (array.type.bit_width if array.type.bit_width else 0) != 8 * width:
        raise ValueError(f"column {what.name!r} is {array.type}, not {width} bytes a row")
    raw = np.frombuffer(
        array.buffers()[1], dtype=np.uint8, count=len(array) * width, offset=array.offset * width
    )
    return raw.view(stored.newbyteorder("<")).reshape(len(array), *what.shape)


def _broken(path: Path, group: int, why: str) -> BrokenShards:
    return BrokenShards(
        f"{path}, row group {group}, is broken: {why}",
        f". `manyhands shards verify {path.parent}` lists all that is; put those files back, make the shards "
        "again, or train without them: data.on_broken=skip",
    )
