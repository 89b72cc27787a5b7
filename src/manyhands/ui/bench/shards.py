"""Measurements of shards: reading them shuffled, training on them, and making them.

Rows are records of endgame positions as tasks/chess_endgames/truth.py makes them. For reading they are made up, since
only their sizes matter; for training they are of three men, solved here; for making they are KPkp, whose tables are
those in the directory that MANYHANDS_SYZYGY names: without it nothing is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from manyhands.plan.schema import Plan
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


def shard_wait() -> Measured:
    """Batches of endgame shards made over batches consumed by the config `endgames`, one thread each."""
    from manyhands.engine.device import share_threads
    from manyhands.engine.loading import micro_batches, step_indices
    from manyhands.engine.world import ALONE
    from manyhands.plan.compose import compose
    from manyhands.tasks.packing import pack
    from manyhands.tasks.registry import family_of

    share_threads(1, 1)
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        pieces = ("task.pieces=KPk", "task.positions=100_000", "task.validation_positions=1000")
        pack(compose(pieces, "endgames"), Path(name) / "shards")
        plan = compose([*pieces, f"data.shards='{name}/shards'"], "endgames")
        family = family_of(plan)
        family.prepare(plan, Path(name) / "task")
        task, size = family.open(plan, Path(name) / "task"), plan.local.batch_size

        steps = task.samples() // size
        parts = step_indices(task, 0, size, steps, plan.seed, ALONE)
        batches = (micro_batches(task, indices, None) for indices in parts)
        first = next(batches)
        started = before = time.perf_counter()
        longest = 0.0
        for _ in batches:
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        loads_per_s = (steps - 1) / (before - started)
        step_s = _step_seconds(task, plan, first[0])
    return Measured(
        value=loads_per_s * step_s,
        note=f"{loads_per_s * size:,.0f} positions/s loaded, {size / step_s:,.0f} learned on this CPU; the longest "
        f"batch took {longest * 1000:.0f} ms, a step {step_s * 1000:.0f} ms",
    )


def _step_seconds(task: Any, plan: Plan, batch: Any) -> float:
    """Of forward, backward and update."""
    from manyhands.engine.optimizer import build_optimizer
    from manyhands.ui.bench.harness import median_seconds

    model = task.build_model()
    optimizer = build_optimizer(plan.local.optimizer, model)

    def step() -> None:
        task.loss(model, batch).mean.backward()
        optimizer.step()
        optimizer.zero_grad()

    return median_seconds(step, repeats=10, warm_up=2)


def shard_make() -> Measured:
    """KPkp with value and policy through `pack` with two processes, over bare probing of the tables by two."""
    tables = os.environ.get("MANYHANDS_SYZYGY")
    if not tables:
        return Measured(
            value=None,
            note="not measured: MANYHANDS_SYZYGY names no directory of Syzygy tables with those of KPkp",
        )
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        os.environ["MANYHANDS_HOME"] = name  # where what is decoded of the tables is kept, once
        _make_kpkp(Path(name) / "first", tables, 20_000)
        bare = _bare_probing(tables, seconds=10.0)
        rate = _make_kpkp(Path(name) / "second", tables, 400_000)
    return Measured(
        value=rate / bare,
        floor=1.0,
        note=f"{rate:,.0f} against {bare:,.0f} positions/s with truth on two processes, the tables of KPkp decoded "
        "before",
    )


def _make_kpkp(directory: Path, tables: str, positions: int) -> float:
    """Positions/s, from the first that was made."""
    from manyhands.data.shards.making import Progress
    from manyhands.plan.compose import compose
    from manyhands.tasks.packing import pack

    plan = compose(
        [f"task.syzygy='{tables}'", f"task.positions={positions}", "task.validation_positions=1000"],
        "endgames",
    )
    told: list[Progress] = []
    pack(plan, directory, processes=2, shard_rows=20_480, on_progress=told.append)
    return told[-1].rows_per_s


def _bare_probing(tables: str, seconds: float) -> float:
    """Positions/s of two processes that ask the package `chess` for the value and for each move's."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        return sum(pool.starmap(_probe, [(tables, seed, seconds) for seed in (1, 2)]))


def _probe(tables: str, seed: int, seconds: float) -> float:
    from manyhands.tasks.chess_endgames.pieces import parse
    from manyhands.tasks.chess_endgames.positions import draw
    from manyhands.tasks.chess_endgames.probing import Prober
    from manyhands.tasks.chess_endgames.record import place

    squares = np.zeros((20_000, 64), dtype=np.uint8)
    for rows, men in draw(parse("KPkp"), np.arange(len(squares)), seed):
        place(squares, rows, men)
    prober, boards = Prober(Path(tables)), squares.tolist()
    for board in boards[:200]:  # the tables are mapped
        prober.probe(board, -1)
    started, done = time.perf_counter(), 200
    while time.perf_counter() - started < seconds and done < len(boards):
        prober.probe(boards[done], -1)
        done += 1
    return (done - 200) / (time.perf_counter() - started)
