"""GPT-2 124M at 1,024 tokens on one CUDA device: bf16, compiled; then sharded by FSDP2, and exported.

    python benchmarks/gpt2_124m.py [--tiny]

Prints JSON: tokens/s, MFU and memory of the compiled training; the largest relative difference of ten losses under
FSDP2, on a mesh of this one device, from those of the whole model; and by how much the exported graph of the trained
checkpoint differs from torch (extra `onnx`).

Needs a CUDA device; --tiny tries the script itself on whatever there is, with a model whose figures mean nothing.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from manyhands.config.extras import EXTRAS
from manyhands.engine.configuration import Configuration, configure
from manyhands.engine.export import export_onnx
from manyhands.engine.loading import micro_batches
from manyhands.engine.optimizer import build_optimizer
from manyhands.engine.parallel import parallelize
from manyhands.engine.run import train
from manyhands.engine.settings import EngineSettings, Execution, Parallel
from manyhands.engine.step import Steering, training_step
from manyhands.engine.world import DATA, TENSOR, World
from manyhands.plan.needs import Package, check_installed
from manyhands.tasks.registry import family_of
from manyhands.tasks.saved import load_saved

GPT2 = (
    "model=gpt2_124m", "task.tokenizer.vocabulary_size=50304", "local.batch_size=480", "local.steps=60",
    "rounds.total=1", "parallel.micro_batch_size=32", "exec.precision=bf16", "exec.compile=default",
    "logging.every_steps=5", "evaluation.max_batches=1", "evaluation.every_snapshots=0",
)  # fmt: skip
TINY = (
    "model=gpt2_tiny", "task.text.max_bytes=500000", "local.batch_size=12", "local.steps=40", "rounds.total=1",
    "exec.precision=bf16", "logging.every_steps=5", "evaluation.max_batches=1", "evaluation.every_snapshots=0",
)  # fmt: skip
SHARDED_STEPS, SHARDED_BATCH = 10, 8


def main() -> None:
    tiny = "--tiny" in sys.argv
    if not tiny and not torch.cuda.is_available():
        print("skipped: no CUDA device here")
        return
    check_installed(Package(module=module, extra="onnx", option="the export") for module in EXTRAS["onnx"])
    configuration = configure(TINY if tiny else GPT2)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        figures = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **trained(configuration, directory),
            **sharded(configuration, directory / "materials"),
            **exported(directory),
        }
    print(json.dumps(figures, indent=1))


def trained(configuration: Configuration, directory: Path) -> dict[str, Any]:
    """The training itself, as `manyhands train` runs it."""
    reports: list[dict[str, Any]] = []
    train(
        configuration.plan,
        directory,
        settings=configuration.settings,
        on_event=lambda event: reports.append(event) if event["kind"] == "step" else None,
    )
    settled = reports[3:]  # what comes before compiles
    return {
        "tokens_per_s": statistics.median(report["tokens_per_s"] for report in settled),
        "mfu": settled[-1]["mfu"],
        "memory_bytes": settled[-1]["memory_bytes"],
        "loss": settled[-1]["loss"],
    }


def sharded(configuration: Configuration, materials: Path) -> dict[str, Any]:
    """Ten steps in fp32, whole and under FSDP2."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = losses(configuration, materials, World(device=device), "ddp")
    with mesh_of_one(device) as world:
        parts = losses(configuration, materials, world, "fsdp")
    return {"fsdp2_difference": max(abs(a - b) / abs(a) for a, b in zip(whole, parts, strict=True))}


def losses(configuration: Configuration, materials: Path, world: World, strategy: str) -> list[float]:
    plan = configuration.plan
    task = family_of(plan).open(plan, materials)
    torch.manual_seed(plan.seed)
    settings = EngineSettings(parallel=Parallel(strategy=strategy), exec=Execution())
    parallelized = parallelize(task.build_model(), world, settings)
    optimizer = build_optimizer(plan.local.optimizer, parallelized.model)
    found = []
    for step in range(SHARDED_STEPS):
        indices = np.arange(step * SHARDED_BATCH, (step + 1) * SHARDED_BATCH)
        taken = training_step(
            task,
            parallelized,
            micro_batches(task, indices, None),
            optimizer=optimizer,
            learning_rate=1e-4,
            steering=Steering(clip_norm=1.0),
            world=world,
        )
        found.append(float(taken.loss))
    return found


@contextmanager
def mesh_of_one(device: torch.device) -> Iterator[World]:
    with tempfile.NamedTemporaryFile() as meeting:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting.name}",
            rank=0,
            world_size=1,
        )
        try:
            yield World(
                device=device, mesh=init_device_mesh(device.type, (1, 1), mesh_dim_names=(DATA, TENSOR))
            )
        finally:
            dist.destroy_process_group()


def exported(directory: Path) -> dict[str, Any]:
    checkpoint = max((directory / "checkpoints").glob("step-*"))
    graph = export_onnx(load_saved(checkpoint), directory / "model.onnx")
    return {
        "onnx_bytes": graph.size_bytes,
        "onnx_difference": graph.difference,
        "onnx_largest_output": graph.largest,
    }


if __name__ == "__main__":
    main()
