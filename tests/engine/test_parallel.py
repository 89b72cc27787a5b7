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

from manyhands.engine.parallel import blocks_of, parallelize
from manyhands.engine.settings import EngineSettings, Parallel
from manyhands.engine.world import DATA, TENSOR, World
from manyhands.errors import PlanError


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


class Told(torch.nn.Module):
    """A model that says how it is divided."""

    def __init__(self, plan: dict[str, str], heads: int = 4) -> None:
        super().__init__()
        self.tp_plan, self.heads = plan, heads
        self.up = torch.nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("model", "tensor", "words"),
    [
        (Told({"up": "colwise"}), 3, r"=3 does not divide the 4 heads of this Told: choose 1, 2 or 4"),
        (Told({"up": "mla_kv_a_proj"}), 2, r"says that up is divided as 'mla_kv_a_proj', which is not known here"),
        (Told({"base.up": "colwise"}), 2, r"has no matrix of those that its tp_plan names; with an adapter"),
        (Told({}), 2, r"does not say how it is divided \(no tp_plan\); use gpt2, llama or qwen3"),
        (Told({"up": "colwise"}, heads=16), 16, r"=16 does not divide the 8 features of up"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided_is_refused(world_of: Any, model: Told, tensor: int, words: str) -> None:
    with world_of(1, tensor) as world, pytest.raises(PlanError, match=words):
        parallelize(model, world, EngineSettings())


def test_blocks_are_the_outermost_lists() -> None:
    linear = torch.nn.Linear

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(linear(2, 2) for _ in range(8))

    layers = [Experts() for _ in range(4)]
    one = torch.nn.ModuleDict(
        {"layers": torch.nn.ModuleList(layers), "head": torch.nn.Sequential(linear(2, 2))}
    )
    assert blocks_of(one) == layers
    assert len(blocks_of(torch.nn.ModuleDict({"all": torch.nn.Sequential(*layers)}))) == 4
    stages = [torch.nn.ModuleList(layers[:2]), torch.nn.ModuleList(layers[2:])]
    assert blocks_of(torch.nn.ModuleDict({"stages": torch.nn.ModuleList(stages)})) == layers
    assert blocks_of(torch.nn.Sequential(*layers)) == layers
    assert blocks_of(torch.nn.Sequential(linear(2, 2), torch.nn.ReLU())) == []


@pytest.mark.parametrize("looks", [False, True])
def test_ddp_looks_for_parameters_without_a_gradient_when_asked(world_of: Any, looks: bool) -> None:
    settings = EngineSettings(parallel=Parallel(unused_parameters=looks))
    with world_of(2, 1) as world:
        forward = parallelize(Model(), world, settings).forward
        assert isinstance(forward, DistributedDataParallel)
        assert forward.find_unused_parameters == looks


def test_activations_are_not_said_to_be_computed_twice_where_they_are_not() -> None:
    settings = EngineSettings(parallel=Parallel(activation_checkpointing=True))
    with pytest.raises(PlanError, match="this model has no repeated blocks"):
        parallelize(torch.nn.Linear(2, 2), World(), settings)
