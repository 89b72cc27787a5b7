"""A checkpoint and what it was trained with: its task over the same materials, its model.

A checkpoint of a training (step-*) has every trained parameter by name, whatever the task, and those that are not
trained are in the materials; one of a networked run (round-*) has the task's own form alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from manyhands.engine.checkpoint import STATE
from manyhands.engine.materials import prepared_mark
from manyhands.engine.trainer import load_weights
from manyhands.errors import DataError, StorageError
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import CustomTask
from manyhands.tasks.protocol import Task, TaskFamily
from manyhands.tasks.registry import family_of
from manyhands.tasks.saved import load_saved


def own_family(plan: Plan | None, allowed: Collection[str]) -> TaskFamily | None:
    """The family of a plan's task, if it is the user's own code. Raises Refused where that is not allowed."""
    return (
        family_of(plan, allowed=allowed) if plan is not None and isinstance(plan.task, CustomTask) else None
    )


def model_of(
    task: Task, plan: Plan, materials: Path, checkpoint: Path, family: TaskFamily | None = None
) -> torch.nn.Module:
    """The task's model with the weights of a checkpoint, on the CPU. Raises StorageError, DataError.

    `family`: that of the task, if it is the user's own code.
    """
    if not (checkpoint / STATE).is_dir():
        return load_saved(checkpoint, family).model
    model = task.build_model()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    wanted = {f"weights/{name}": tensor for name, tensor in trained.items()}
    try:
        if len(trained) < sum(1 for _ in model.parameters()):
            first = materials / prepared_mark(materials, plan_hash(plan)).read_text(encoding="utf-8").strip()
            load_weights(model, load_file(first))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it should be
            load(wanted, storage_reader=HuggingFaceStorageReader(str(checkpoint / STATE)), no_dist=True)
    except (OSError, SafetensorError, ValueError, KeyError, CheckpointException) as error:
        reason = " ".join(str(error).split())[-300:]
        raise StorageError(f"checkpoint {checkpoint / STATE}: {reason}; give another checkpoint") from error
    return model


def open_task(plan: Plan, materials: Path, allowed: Collection[str]) -> Task:
    """The task over materials that were prepared before. Raises DataError, Refused, PlanError."""
    if not materials.is_dir():
        raise DataError(f"{materials} does not exist: the materials of the training are needed")
    return family_of(plan, allowed=allowed).open(plan, materials)
