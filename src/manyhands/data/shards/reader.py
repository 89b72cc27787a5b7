"""Reading shards: any rows of a set, in any order, in bounded memory."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.data.shards.decoded import SLOTS_OF_EVALUATION, Arrays, BrokenShards, DecodedGroups
from manyhands.data.shards.manifest import TRAINING, Manifest, ShardFile, ShardSet, read_manifest
from manyhands.data.shards.order import WINDOW, BlockOrder, Int64s
from manyhands.errors import DataError


class Shards:
    """An opened directory of shards.

    `rows` is a function of its arguments alone. `order` is the training's own order of a set's rows; reading in it
    costs one decompression of each row group in an epoch, and the groups of the next window are decompressed ahead.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self._sets = {
            name: DecodedGroups(directory, part, 2 * WINDOW if name == TRAINING else SLOTS_OF_EVALUATION)
            for name, part in manifest.sets.items()
        }
        self._orders = {name: BlockOrder(groups.rows) for name, groups in self._sets.items()}
        self._window: tuple[int, int, int] | None = None  # seed, epoch and end of the one that is being read

    @classmethod
    def open(cls, directory: Path, without: Collection[str] = ()) -> Shards:
        """`without`: names of files to leave out, of those that the manifest names.

        Every file must be there and have its size; their contents are checked as they are read. Raises DataError.
        """
        manifest = read_manifest(directory)
        manifest = manifest.model_copy(
            update={"sets": {name: _without(part, name, without) for name, part in manifest.sets.items()}}
        )
        for part in manifest.sets.values():
            for file in part.files:
                fault = missing(directory, file)
                if fault is not None:
                    raise BrokenShards(
                        fault,
                        "; put it back, make the shards again, or train without what is broken: data.on_broken=skip",
                    )
        return cls(directory, manifest)

    def __len__(self) -> int:
        return self.manifest.sets[TRAINING].rows

    def samples(self, name: str = TRAINING) -> int:
        return self._set(name).rows

    def rows(self, indices: npt.NDArray[np.int64], name: str = TRAINING) -> dict[str, npt.NDArray[Any]]:
        """The rows at `indices` (int64 [n], in any order, repeated or not) of a set: by column, new arrays [n, ...].

        Raises DataError for an index outside, and for a row group that is broken.
        """
        total = self._set(name).rows
        if indices.size and (indices.min() < 0 or indices.max() >= total):
            raise DataError(
                f"rows {indices.min()}..{indices.max()} do not lie within the {total} rows of {name!r} in "
                f"{self.directory}"
            )
        arrays: Arrays = self._sets[name].gather(np.asarray(indices, dtype=np.int64))
        return arrays

    def order(self, positions: Int64s, seed: int, epoch: int) -> Int64s:
        """The training rows at these positions (int64 [n]) of an epoch: a permutation for each seed and epoch.

        Says also where reading goes on: the row groups of the next window are decompressed meanwhile.
        """
        order = self._orders[TRAINING]
        rows = order.rows(positions, seed, epoch)
        if positions.size:
            self._look_ahead(order, int(positions.max()), seed, epoch)
        return rows

    def _look_ahead(self, order: BlockOrder, position: int, seed: int, epoch: int) -> None:
        end = order.window_end(position, seed, epoch)
        if self._window == (seed, epoch, end):
            return
        self._window = (seed, epoch, end)
        now = order.window_groups(position, seed, epoch)
        follows = (end, seed, epoch) if end < order.total else (0, seed, epoch + 1)
        self._sets[TRAINING].move(now.tolist(), order.window_groups(*follows).tolist())

    def close(self) -> None:
        for groups in self._sets.values():
            groups.close()

    def _set(self, name: str) -> ShardSet:
        part = self.manifest.sets.get(name)
        if part is None:
            known = ", ".join(self.manifest.sets)
            raise DataError(f"shards {self.directory} have no set {name!r}; they have {known}")
        return part


def missing(directory: Path, file: ShardFile) -> str | None:
    """What is wrong with a file without opening it: it is not there, or has another size."""
    path = directory / file.name
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: {error.strerror}"
    if size != file.size_bytes:
        return f"{path} has {size:,} bytes, and the manifest says {file.size_bytes:,}: it was cut or changed"
    return None


def _without(part: ShardSet, name: str, files: Collection[str]) -> ShardSet:
    left = tuple(file for file in part.files if file.name not in files)
    if not left:
        raise DataError(f"all shards of the set {name!r} are broken: make them again")
    return part.model_copy(update={"files": left})
