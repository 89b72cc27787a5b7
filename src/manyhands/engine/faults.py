"""What cannot be trained here, said before anything is loaded; and faults of torch, in words."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from manyhands.engine.kept_checkpoints import check_plan_of, checkpoints, find_checkpoint
from manyhands.engine.materials import prepared_mark
from manyhands.engine.settings import EngineSettings
from manyhands.engine.world import Place, data_size_of, is_lost
from manyhands.errors import ManyhandsError, PlanError, RankLost, Refused, WorkerError
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import DummyTask
from manyhands.tasks.dummy import NO_MODEL
from manyhands.tasks.registry import check_task

_SOURCE: Final = re.compile(r"\[/\S+:\d+\] ?")
"""Where in torch's own sources something was found."""


def check_trainable(
    plan: Plan, place: Place, directory: Path, resume: Path | None, settings: EngineSettings
) -> None:
    """Refuse before anything is loaded what cannot be trained here."""
    if isinstance(plan.task, DummyTask):
        raise PlanError(NO_MODEL)
    if plan.local.kind != "steps":
        raise PlanError(
            f"local.kind is {plan.local.kind!r}: training on this machine alone takes optimizer steps; set "
            "local.kind=steps with local.optimizer, or run the plan with a server"
        )
    ties: tuple[tuple[str, bool | float, str], ...] = (
        ("local.proximal", plan.local.proximal, "0"),
        ("local.control_variate", plan.local.control_variate, "false"),
    )
    for setting, value, off in ties:
        if value:
            raise PlanError(
                f"{setting} is {value}: it ties clients to each other, and one machine alone has nobody to be tied "
                f"to; set {setting}={off} here, or run the plan with a server"
            )
    data_size = data_size_of(place.world_size, settings.parallel)
    if plan.local.batch_size % data_size:
        raise PlanError(
            f"local.batch_size={plan.local.batch_size} cannot be divided among {data_size} processes: choose "
            f"{plan.local.batch_size // data_size * data_size or data_size} or another multiple of {data_size}"
        )
    if place.leads:
        check_task(plan)
        _check_directory(plan, directory, resume)


def _check_directory(plan: Plan, directory: Path, resume: Path | None) -> None:
    """Before anything in it is changed: what is there must be of this plan."""
    if resume is not None:
        check_plan_of(find_checkpoint(resume), plan)
    elif checkpoints(directory / "checkpoints"):
        raise Refused(
            f"{directory} holds checkpoints of an earlier training: go on from it with --resume {directory}, or "
            "choose another directory"
        )
    materials = directory / "materials"
    if plan.data.shards is not None and prepared_mark(materials, plan_hash(plan)).is_file():
        from manyhands.tasks.sharded import check_prepared

        check_prepared(plan, materials)


def in_words(error: RuntimeError, place: Place, missing: Sequence[int] = ()) -> ManyhandsError | None:
    """What to do, if torch ran out of memory, this process lost the others, or DDP met a parameter without a
    gradient; None for anything else.

    missing: the ranks for which the others have waited in vain, if it is that.
    """
    text = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    text = textwrap.shorten(_SOURCE.sub("", text), 200, placeholder=" ...")
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return WorkerError(
            f"out of memory ({text}): lower parallel.micro_batch_size, set parallel.activation_checkpointing=true or "
            "exec.precision=bf16, or divide the model among devices with parallel.strategy=fsdp"
        )
    if "find_unused_parameters" in str(error):
        return PlanError(
            "parameters of this model took no part in a step, and DDP waits for their gradients: set "
            "parallel.unused_parameters=true, or give the model none that its loss does not need"
        )
    if missing:
        return RankLost(
            f"rank {place.rank} waited for rank {', '.join(map(str, missing))} in vain: look at what that one does, "
            "or raise exec.rank_timeout_s (a client: --rank-timeout)"
        )
    if place.world_size > 1 and is_lost(error):
        return RankLost(
            f"rank {place.rank} lost the others ({text}): see what the one that ended first has said"
        )
    return None
