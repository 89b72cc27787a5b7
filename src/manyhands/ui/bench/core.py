"""Measurements of what stands under every run: start, fingerprint, aggregation."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.ui.bench.harness import Measured, median_seconds

if TYPE_CHECKING:
    from manyhands.updates.aggregation import Aggregation

LARGE = (12, 768, 50_257, 1024)
"""Layers, width, vocabulary, context of GPT-2's smallest: 124M parameters."""
SMALL = (6, 384, 4_096, 256)
"""12M parameters."""
DISTINCT_UPDATES = 4
"""So many different files stand for all updates of a round; together they exceed any processor's cache."""


def help_start() -> Measured:
    """`manyhands --help` as its user starts it; the floor is Python's own start."""
    command = [str(Path(sys.executable).with_name("manyhands")), "--help"]
    value = median_seconds(lambda: subprocess.run(command, capture_output=True, check=True), repeats=9)
    bare = [sys.executable, "-c", "pass"]
    floor = median_seconds(lambda: subprocess.run(bare, capture_output=True, check=True), repeats=9)
    return Measured(value=value, floor=floor, note="median of 9 whole processes; floor: python -c pass")


def fingerprint_rate() -> Measured:
    from manyhands.updates.exact import fingerprint

    tensors = _random_tensors(gpt_parameters(*LARGE))
    size = sum(tensor.nbytes for tensor in tensors.values())
    seconds = median_seconds(lambda: fingerprint(tensors, threads=1), repeats=5)
    flat = np.concatenate([tensor.reshape(-1) for tensor in tensors.values()]).view(np.uint32)
    reading = median_seconds(lambda: int(flat.sum(dtype=np.uint64)), repeats=5)
    return Measured(
        value=size / seconds / 1e9,
        floor=size / reading / 1e9,
        note="floor: a plain integer sum over the same bytes",
    )


def aggregate_rate() -> Measured:
    return _rate(LARGE, updates=10)


def aggregate_rate_12m() -> Measured:
    return _rate(SMALL, updates=40)


def aggregate_peak() -> Measured:
    return _peak(LARGE, updates=10)


def aggregate_peak_12m() -> Measured:
    return _peak(SMALL, updates=40)


def gpt_parameters(layers: int, width: int, vocabulary: int, context: int) -> list[Parameter]:
    """The parameter table of a GPT-2 of this size."""
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, width), "wpe": (context, width)}
    for layer in range(layers):
        for name, shape in {
            "attn.c_attn": (width, 3 * width),
            "attn.c_proj": (width, width),
            "mlp.c_fc": (width, 4 * width),
            "mlp.c_proj": (4 * width, width),
        }.items():
            shapes[f"h.{layer}.{name}.weight"] = shape
            shapes[f"h.{layer}.{name}.bias"] = (shape[1],)
        for norm in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{norm}.weight"] = shapes[f"h.{layer}.{norm}.bias"] = (width,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    return [Parameter(name=name, shape=shape) for name, shape in shapes.items()]


def _rate(size: tuple[int, int, int, int], updates: int) -> Measured:
    """Input rate of a star's aggregator, check included, and by turns with it the rate of a memory copy."""
    merging, copying = [], []
    with _round(size) as (aggregation, files, model_bytes):
        copy = _Copy(model_bytes)
        for number in range(updates):
            copying.append(copy.seconds())
            start = time.perf_counter()
            _merge(aggregation, files, number)
            merging.append(time.perf_counter() - start)
        aggregation.close()
    rate, floor = (model_bytes / statistics.median(seconds) / 1e9 for seconds in (merging, copying))
    whole = updates * model_bytes / sum(merging) / 1e9
    return Measured(
        value=rate,
        floor=floor,
        target=floor / 3,
        note=f"floor: memory copy, by turns with the updates; medians of {updates}, all of them together at "
        f"{whole:.2f} GB/s; target: a third of the floor; {len(files)} files in the page cache stand for {updates}",
    )


def _peak(size: tuple[int, int, int, int], updates: int) -> Measured:
    """Peak anonymous memory of a star's aggregator over a whole round, in models."""
    with _AnonymousMemory() as memory, _round(size) as (aggregation, files, model_bytes):
        before = _anonymous_bytes()
        for number in range(updates):
            _merge(aggregation, files, number)
        directory = files[0].parent
        aggregation.advance(_closing(updates, model_bytes), directory / "change.safetensors")
        aggregation.close()
    return Measured(
        value=memory.peak_bytes / model_bytes,
        floor=1.0,
        note=f"whole process, {memory.peak_bytes / 2**20:.0f} MiB, {before / 2**20:.0f} MiB of it "
        "before the first update; floor: the sum itself",
    )


@contextmanager
def _round(size: tuple[int, int, int, int]) -> Iterator[tuple[Aggregation, list[Path], int]]:
    """An aggregator before its first update, the files of updates in the page cache, and the bytes of one."""
    from manyhands.updates.aggregation import Aggregation

    plan = Plan()
    parameters = gpt_parameters(*size)
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        directory = Path(name)
        first = _first_snapshot(plan, parameters, directory / "first.safetensors")
        files = _updates(plan, parameters, directory)
        for file in files:
            _read(file)
        aggregation = Aggregation(plan, parameters, directory / "aggregator", first)
        yield aggregation, files, 4 * sum(int(np.prod(p.shape)) for p in parameters)


def _merge(aggregation: Aggregation, files: Sequence[Path], number: int) -> None:
    file = files[number % len(files)]
    aggregation.merge(f"0-{number}", file, round_number=0, weight=1, norm=None)


def _read(file: Path) -> None:
    """Into the page cache, in pieces: not into this process's memory, which is measured."""
    with file.open("rb") as opened:
        while opened.read(1 << 20):
            pass


def _closing(updates: int, size: int) -> Any:
    from manyhands.coordination.types import BlobRef, Closing, Counted, OuterTerms

    counted = tuple(
        Counted(
            assignment=f"0-{n}",
            client=f"{n:064x}",
            update=BlobRef(blob=f"{n:064x}", size_bytes=size),
            weight=1,
        )
        for n in range(updates)
    )
    terms = OuterTerms(lr=1.0)
    return Closing(round=0, fragment=0, counted=counted, uncounted=(), outer=terms, closed_ms=0)


def _first_snapshot(plan: Plan, parameters: Sequence[Parameter], path: Path) -> Path:
    from manyhands.updates import tensorfile

    generator = np.random.default_rng(1)
    with tensorfile.written(path, wire.snapshot_schema(plan, parameters)) as arrays:
        for array in arrays.values():
            array[...] = generator.standard_normal(array.shape, dtype=np.float32)
    return path


def _updates(plan: Plan, parameters: Sequence[Parameter], directory: Path) -> list[Path]:
    from manyhands.updates import tensorfile

    generator = np.random.default_rng(2)
    files = []
    for number in range(DISTINCT_UPDATES):
        path = directory / f"update-{number}.safetensors"
        with tensorfile.written(path, wire.update_schema(plan, parameters)) as arrays:
            for array in arrays.values():
                array[...] = generator.standard_normal(array.shape, dtype=np.float32) * np.float32(1e-3)
        files.append(path)
    return files


def _random_tensors(parameters: Sequence[Parameter]) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    generator = np.random.default_rng(0)
    return {p.name: generator.standard_normal(p.shape, dtype=np.float32) for p in parameters}


class _Copy:
    """One thread's memory copy between two buffers of this size."""

    def __init__(self, size: int) -> None:
        self._source = np.ones(size, dtype=np.uint8)
        self._destination = np.ones(size, dtype=np.uint8)

    def seconds(self) -> float:
        start = time.perf_counter()
        np.copyto(self._destination, self._source)
        return time.perf_counter() - start


class _AnonymousMemory:
    """The largest RssAnon of this process while the block runs, sampled every few milliseconds (Linux)."""

    def __init__(self) -> None:
        self.peak_bytes = _anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes())

    def __enter__(self) -> _AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, _anonymous_bytes())


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell anonymous memory apart (RssAnon in /proc/self/status)")
