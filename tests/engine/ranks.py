"""One rank of trainings by several processes: python ranks.py DIRECTORY RANK MODE... writes losses to MODE.json.

Each mode is a training of its own, in the same process, so that importing torch is paid once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import manyhands.engine.run as engine
from manyhands.engine.events import Event
from manyhands.engine.rendezvous import meet
from manyhands.engine.settings import Checkpoints, EngineSettings, Execution, Logging, Parallel
from manyhands.engine.world import Place
from manyhands.plan.compose import load_plan
from manyhands.tasks.protocol import Loss

PARALLEL = {
    "single": Parallel(),
    "accumulated": Parallel(micro_batch_size=4),
    "ddp": Parallel(),
    "ddp_accumulated": Parallel(micro_batch_size=2),
    "fsdp": Parallel(strategy="fsdp", activation_checkpointing=True),
    "tensor": Parallel(tensor_parallelism=2),
    "fsdp_accumulated": Parallel(strategy="fsdp", micro_batch_size=2),
    "ddp_resumed": Parallel(),
    "fsdp_resumed": Parallel(strategy="fsdp"),
    "ddp_one_nan": Parallel(),
    "wrong_data": Parallel(),
    "muon_single": Parallel(),
    "muon_ddp": Parallel(),
    "muon_fsdp": Parallel(strategy="fsdp"),
    "bf16_single": Parallel(),
    "bf16_ddp": Parallel(),
    "bf16_fsdp": Parallel(strategy="fsdp"),
    "product": Parallel(tensor_parallelism=2),
    "qwen3_single": Parallel(),
    "qwen3_tensor": Parallel(tensor_parallelism=2),
    "qwen3_product": Parallel(tensor_parallelism=2),
    "gpt2_single": Parallel(),
    "gpt2_tensor": Parallel(tensor_parallelism=2),
    "grids_single": Parallel(),
    "grids_ddp": Parallel(),
    "grids_tensor": Parallel(tensor_parallelism=2),
}


class Spoilt:
    """A task whose loss is not a number."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def loss(self, model: Any, batch: Any) -> Loss:
        loss = self.task.loss(model, batch)
        return Loss(mean=loss.mean * float("nan"), count=loss.count)


def spoiling(right: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """A training step whose fourth loss is spoilt on rank 1 alone."""
    calls = []

    def step(task: Any, *arguments: Any, **more: Any) -> Any:
        calls.append(1)
        return right(Spoilt(task) if rank == 1 and len(calls) == 4 else task, *arguments, **more)

    return step


def train(directory: Path, rank: int, size: int, mode: str) -> None:
    kind = mode.partition("_")[0]
    plan = load_plan(
        directory / (f"{kind}.yaml" if kind in ("gpt2", "grids", "muon", "qwen3") else "plan.yaml")
    )
    place = Place()
    if size > 1:
        here = directory / f"meeting-{mode}"
        place = Place(
            rank=rank,
            world_size=size,
            local_rank=rank,
            local_size=size,
            meet=partial(meet, here, rank, size, wait_s=60),
        )
    losses: list[float] = []
    metrics: list[dict[str, float]] = []
    skipped: list[int] = []
    warned: list[str] = []

    def saw(event: Event) -> None:
        if event["kind"] == "step":
            losses.append(event["loss"])
            skipped.append(event["skipped"])
        if event["kind"] == "warning":
            warned.append(event["text"])
        if event["kind"] == "evaluation":
            metrics.append(event["metrics"])

    right, right_step = engine.step_indices, engine.training_step
    if mode == "ddp_one_nan":
        engine.training_step = spoiling(right_step, rank)
    if mode == "wrong_data" and rank == 1:
        engine.step_indices = lambda task, sample, *more: right(task, sample + 1, *more)
    result = engine.train(
        plan,
        directory / mode,
        settings=EngineSettings(
            parallel=PARALLEL[mode],
            logging=Logging(every_steps=1),
            checkpoints=Checkpoints(asynchronous=mode != "ddp"),
            exec=Execution(
                on_nonfinite="skip" if mode == "ddp_one_nan" else "stop",
                precision="pure_bf16" if kind == "bf16" else "fp32",
            ),
        ),
        resume=directory / "single/checkpoints/step-00000010"
        if mode.endswith("resumed") and rank == 0  # whose word counts
        else None,
        place=place,
        on_event=saw,
    )
    engine.step_indices, engine.training_step = right, right_step
    if rank == 0:
        told = {
            "losses": losses,
            "metrics": metrics,
            "skipped": skipped,
            "warned": warned,
            "before": result.validation_loss_before,
            "after": result.validation_loss_after,
        }
        (directory / f"{mode}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    for mode in sys.argv[4:]:
        train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), mode)
