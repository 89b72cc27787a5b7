from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from manyhands.engine.faults import in_words
from manyhands.engine.world import Place
from manyhands.errors import RankLost, WorkerError

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
