"""Measurements of shards: reading them shuffled, and making them.

Rows are records of endgame positions as tasks/chess_endgames/truth.py makes them; for reading they are made up, since
only their sizes matter, so that no tables are needed. One core: a process that reads ahead in a thread pays for it.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from manyhands.ui.bench.harness import Measured

MOVES: Final = 34
"""Columns of moves of KPRkrp: a row has 204 bytes."""
_SHARDS, _SHARD_ROWS, _GROUP_ROWS, _BATCH = 12, 65_536, 8192, 1024


def shard_read() -> Measured:
    """786,432 positions, shuffled, 1024 at a time, on one core; floor: decoding the same files from end to end."""
    from manyhands.data.shards.reader import Shards

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        directory = Path(name) / "shards"
        size = _make_up(directory)
        rows = _SHARDS * _SHARD_ROWS
        bare, ours, waits = [], [], []
        for epoch in range(3):
            bare.append(rows / _decode_all(directory))
            opened = Shards.open(directory)
            started, longest = time.perf_counter(), 0.0
            for first in range(0, rows, _BATCH):
                before = time.perf_counter()
                opened.rows(opened.order(np.arange(first, first + _BATCH), 1337, epoch))
                longest = max(longest, time.perf_counter() - before)
            ours.append(rows / (time.perf_counter() - started))
            waits.append(longest)
            opened.close()
    return Measured(
        value=float(np.median(ours)),
        floor=float(np.median(bare)),
        note=f"{size / rows:.0f} bytes a position on disk; the longest of {rows // _BATCH} batches took "
        f"{min(waits) * 1000:.0f} ms, a window's {32 * _GROUP_ROWS:,} positions being decompressed",
    )


def _make_up(directory: Path) -> int:
    """Shards of positions that look like endgames; their bytes."""
    from manyhands.data.shards.manifest import MANIFEST, Made, Manifest, ShardSet, write_json
    from manyhands.data.shards.writer import columns_of, write_shard

    directory.mkdir()
    files = []
    for number in range(_SHARDS):
        generator = np.random.default_rng(number)
        groups = [_positions(generator, _GROUP_ROWS) for _ in range(_SHARD_ROWS // _GROUP_ROWS)]
        columns = columns_of(groups[0], "bench")
        files.append(write_shard(directory / f"training-{number:05}.parquet", columns, groups))
    sets = {"training": ShardSet(columns=columns, group_rows=_GROUP_ROWS, files=tuple(files))}
    made = Made(command="bench", time="now", manyhands="bench", seed=0, rows=sets["training"].rows, task={})
    manifest = Manifest(task={"name": "chess_endgames"}, seed=0, sets=sets, made=(made,))
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))
    return sum(file.size_bytes for file in files)


def _positions(generator: np.random.Generator, count: int) -> dict[str, npt.NDArray[Any]]:
    squares = np.zeros((count, 64), dtype=np.uint8)
    for piece in (6, 4, 1, 12, 10, 7):
        squares[np.arange(count), generator.integers(64, size=count)] = piece
    there = np.arange(MOVES) < generator.integers(3, MOVES, size=(count, 1))
    moves = np.where(there, np.sort(generator.integers(4096, size=(count, MOVES))), -1)
    return {
        "squares": squares,
        "en_passant": np.full(count, -1, dtype=np.int8),
        "value": generator.integers(3, size=count, dtype=np.uint8),
        "dtz": generator.integers(-60, 60, size=count, dtype=np.int16),
        "moves": moves.astype(np.int16),
        "outcomes": np.where(there, generator.integers(3, size=(count, MOVES)), 255).astype(np.uint8),
        "best": (there & (generator.random((count, MOVES)) < 0.1)).astype(np.uint8),
    }


def _decode_all(directory: Path) -> float:
    """Seconds to decode all files with pyarrow, in one thread, row group by row group."""
    from manyhands.data.shards.writer import parquet

    started = time.perf_counter()
    for file in sorted(directory.glob("*.parquet")):
        with parquet().ParquetFile(file) as opened:
            for group in range(opened.num_row_groups):
                opened.read_row_group(group, use_threads=False)
    return time.perf_counter() - started
