"""How a model is divided, in one process that plays the first of several (torch's fake process group)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from manyhands.engine.parallel import parallelize
from manyhands.engine.settings import EngineSettings, Parallel
from manyhands.engine.world import DATA, TENSOR, World


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(width, width), torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


class Model(torch.nn.Module):
    """Four blocks, and as much again in the embedding."""

    tp_plan: ClassVar = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8 * width, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(4))


@pytest.fixture
def world_of() -> Callable[..., Any]:
    @contextmanager
    def made(data: int, tensor: int, device: str = "cpu") -> Iterator[World]:
        size = data * tensor
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        try:
            mesh = init_device_mesh(device, (data, tensor), mesh_dim_names=(DATA, TENSOR))
            yield World(device=torch.device(device), size=size, data_size=data, tensor_size=tensor, mesh=mesh)
        finally:
            dist.destroy_process_group()

    return made


def here(model: torch.nn.Module) -> int:
    """Numbers that this process holds of its parameters."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


FSDP = EngineSettings(parallel=Parallel(strategy="fsdp"))


@pytest.mark.parametrize(
    ("data", "tensor", "settings", "kind"),
    [
        (4, 1, EngineSettings(), DistributedDataParallel),
        (4, 1, FSDP, FSDPModule),
        (2, 2, EngineSettings(), FSDPModule),  # DDP knows no tensors that are divided already
        (2, 2, FSDP, FSDPModule),
    ],
    ids=["ddp", "fsdp", "ddp times tensor", "fsdp times tensor"],
)
def test_what_goes_around_the_model(
    world_of: Any, data: int, tensor: int, settings: EngineSettings, kind: type
) -> None:
    with world_of(data, tensor) as world:
        model = Model()
        whole = here(model)
        assert isinstance(parallelize(model, world, settings).forward, kind)
        if kind is FSDPModule:
            assert here(model) <= whole / data
            matrix = model.blocks[0].up.weight
            assert isinstance(matrix, DTensor)
            assert matrix.to_local().numel() == matrix.numel() / 4
        else:
            assert here(model) == whole


@pytest.mark.parametrize(("data", "tensor"), [(4, 1), (2, 2)])
def test_a_model_that_is_sharded_is_never_moved_as_a_whole(
    world_of: Any, monkeypatch: pytest.MonkeyPatch, data: int, tensor: int
) -> None:
    """It may be larger than a device: its parts are moved by those who divide it."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the whole model was moved")

    with world_of(data, tensor) as world:
        model = Model()
        monkeypatch.setattr(Model, "to", refused)
        parallelize(model, world, FSDP)
        if tensor == 1:
            with pytest.raises(AssertionError, match="the whole model was moved"):
                parallelize(Model(), world, EngineSettings())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("data", "tensor"), [(8, 1), (4, 2)])
def test_a_device_never_holds_more_than_its_part_and_a_block(world_of: Any, data: int, tensor: int) -> None:
    with world_of(data, tensor, "cuda") as world:
        model = Model(width=1024)
        whole = 4 * here(model)
        torch.cuda.reset_peak_memory_stats()
        parallelize(model, world, FSDP)
        assert all(p.device.type == "cuda" for p in model.parameters())
        # The embedding is half of the model, and the largest that is moved at once.
        assert torch.cuda.max_memory_allocated() < 0.75 * whole
