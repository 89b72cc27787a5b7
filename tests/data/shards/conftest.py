"""Made-up rows of every kind that shards hold, and a directory of shards of them, made in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from manyhands.data.shards.manifest import MANIFEST, Made, Manifest, ShardSet, write_json
from manyhands.data.shards.writer import columns_of, write_shard

Rows = dict[str, npt.NDArray[Any]]


def rows_of(positions: npt.NDArray[np.int64]) -> Rows:
    """Rows that say which they are; functions of their positions."""
    spread = positions[:, None] + np.arange(5)
    return {
        "number": positions,
        "tokens": (spread * 7 % 300).astype(np.int64),
        "small": (spread % 200 - 100).astype(np.int16),
        "mask": spread % 3 == 0,
        "one_mask": positions % 2 == 0,
        "grid": (positions[:, None, None] + np.arange(6).reshape(2, 3)).astype(np.float32),
    }


def write_shards(
    directory: Path, rows: int = 1000, shard: int = 250, group: int = 64, *, first: int = 0, seed: int = 7
) -> Path:
    """Shards of `rows_of`, without any process: training, and 30 rows of validation."""
    directory.mkdir()
    columns, sets = columns_of(rows_of(np.arange(1)), "test"), {}
    for name, count in (("training", rows), ("validation", 30)):
        files = []
        for number, start in enumerate(range(0, count, shard)):
            stop = min(start + shard, count)
            groups = [
                rows_of(first + np.arange(at, min(at + group, stop), dtype=np.int64))
                for at in range(start, stop, group)
            ]
            files.append(write_shard(directory / f"{name}-{number:05}.parquet", columns, groups))
        sets[name] = ShardSet(columns=columns, group_rows=group, files=tuple(files))
    made = Made(command="test", time="now", manyhands="0", seed=seed, rows=rows, task={"name": "grids"})
    manifest = Manifest(task={"name": "grids"}, seed=seed, sets=sets, made=(made,))
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return directory


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    def make(*sizes: int, at: str = "shards", **more: int) -> Path:
        return write_shards(tmp_path / at, *sizes, **more)

    return make


@pytest.fixture(scope="module")
def kept_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that leave them as they were."""
    return write_shards(tmp_path_factory.mktemp("kept") / "shards")


@pytest.fixture
def digests() -> Callable[[Path], dict[str, str]]:
    """Of the Parquet files of a directory."""

    def take(directory: Path) -> dict[str, str]:
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(directory.glob("*.parquet"))
        }

    return take


@pytest.fixture
def expected_rows() -> Callable[[npt.NDArray[np.int64]], Rows]:
    return rows_of
