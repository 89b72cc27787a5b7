from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from manyhands.engine.faults import in_words
from manyhands.engine.run import train
from manyhands.engine.world import Place
from manyhands.errors import PlanError, RankLost, WorkerError
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import DummyTask
from manyhands.tasks.registry import family_of

ALONE, TOGETHER = Place(), Place(rank=1, world_size=2)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 4 bytes"
        ),
    ],
)
def test_out_of_memory_says_what_to_lower(error: RuntimeError) -> None:
    told = in_words(error, ALONE)
    assert isinstance(told, WorkerError)
    assert "lower parallel.micro_batch_size" in str(told)
    assert "parallel.strategy=fsdp" in str(told)


def test_a_parameter_without_a_gradient_names_the_setting() -> None:
    """The words are torch's."""
    error = RuntimeError(
        "Expected to have finished reduction in the prior iteration before starting a new one. You can enable unused "
        "parameter detection by passing the keyword argument `find_unused_parameters=True`"
    )
    told = in_words(error, TOGETHER)
    assert isinstance(told, PlanError)
    assert "set parallel.unused_parameters=true" in str(told)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistBackendError("NCCL error"),
        RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"),
    ],
)
def test_a_rank_that_lost_the_others_says_so(error: RuntimeError) -> None:
    assert isinstance(in_words(error, TOGETHER), RankLost)


def test_other_errors_stay_as_they_are() -> None:
    assert in_words(RuntimeError("the SkipConnection of layer 3 has no shape"), TOGETHER) is None
    assert in_words(RuntimeError("Connection closed by peer"), ALONE) is None


def test_a_model_that_cannot_be_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    plan = resolve({"task": {"model": {"n_layr": 3}}})
    with pytest.raises(PlanError, match="Did you mean 'n_layer'"):
        train(plan, tmp_path / "training")
    assert not (tmp_path / "training").exists()


def test_the_task_without_a_model_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    for refused in (
        lambda: train(Plan(task=DummyTask()), tmp_path / "run"),
        lambda: family_of(Plan(task=DummyTask())).open(Plan(task=DummyTask()), tmp_path),
    ):
        with pytest.raises(
            PlanError, match=r"'dummy', .*`manyhands server run --plan dummy`; give a task with"
        ):
            refused()
    assert not (tmp_path / "run").exists()
