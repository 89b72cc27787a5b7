"""A model on many devices: tensor parallel, activation checkpointing, compiling, then FSDP2 or DDP around it.

All of it is torch's own (DTensor, fully_shard, DistributedDataParallel); what is here decides where each is applied,
from the model alone, so that a task need not know. A model's repeated blocks are found as its longest ModuleList. How
its matrices are divided among tensor ranks it says itself, as `tp_plan`: module name with * for any number, and
colwise, rowwise or colwise_gather_output, the form of `transformers`.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from manyhands.engine.settings import EngineSettings
from manyhands.engine.world import DATA, TENSOR, World
from manyhands.errors import PlanError

_FIXED_BUFFERS: Final[Mapping[str, Any]] = {  # the option has another name from torch 2.13 on
    "forward_sync_buffers"
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else "broadcast_buffers": False
}
_CPU_BUCKET_MB: Final = 25
"""Also of the first bucket, which is 1 MB elsewhere so that it travels early: what exchanges takes turns with what
computes on a core, and each bucket costs them a meeting."""
_HEADS: Final = ("num_attention_heads", "num_key_value_heads", "n_head", "heads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelized:
    """`model` has the parameters, under their own names; `forward` is what to call, and may wrap it."""

    model: torch.nn.Module
    forward: torch.nn.Module

    @classmethod
    def whole(cls, model: torch.nn.Module) -> Parallelized:
        """A model as it is, on one device."""
        return cls(model=model, forward=model)

    def synchronizing(self, last: bool) -> AbstractContextManager[object]:
        """The context of a micro-batch: only the last one's backward pass exchanges gradients."""
        if isinstance(self.forward, DistributedDataParallel) and not last:
            return self.forward.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()


def parallelize(model: torch.nn.Module, world: World, settings: EngineSettings) -> Parallelized:
    """Prepare a model for this world, and bring it to its device. Raises PlanError for what cannot be divided.

    It comes whole and on the CPU. What is divided gets to the device in parts, a matrix or a block at a time, so that
    a model fits which no device could hold whole.
    """
    if world.tensor_size > 1:
        _divide_matrices(model, world)
    product = world.tensor_size > 1 and world.data_size > 1  # DDP knows no tensors that are divided already
    sharded = world.mesh is not None and (settings.parallel.strategy == "fsdp" or product)
    if not sharded:
        model.to(world.device)
    blocks = blocks_of(model)
    if settings.parallel.activation_checkpointing:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if settings.exec.compile != "off":
        mode = None if settings.exec.compile == "default" else settings.exec.compile
        model.compile(mode=mode)
    forward: torch.nn.Module = model
    if sharded:
        _shard(model, blocks, world, settings)
    elif world.data_size > 1:
        assert world.mesh is not None
        forward = DistributedDataParallel(
            model,
            process_group=world.mesh[DATA].get_group(),
            gradient_as_bucket_view=True,
            bucket_cap_mb=_CPU_BUCKET_MB if world.device.type == "cpu" else None,
            **_FIXED_BUFFERS,
        )
    return Parallelized(model=model, forward=forward)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's repeated blocks: the members of its longest ModuleList, and of others that are as long."""
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    longest = max(map(len, lists), default=0)
    return [block for blocks in lists if len(blocks) == longest for block in blocks]


def _shard(
    model: torch.nn.Module, blocks: list[torch.nn.Module], world: World, settings: EngineSettings
) -> None:
    assert world.mesh is not None
    policy = MixedPrecisionPolicy()
    if settings.exec.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Models return logits as views; the training step changes none of them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for block in blocks:
        fully_shard(block, mesh=world.mesh[DATA], mp_policy=policy)
    fully_shard(model, mesh=world.mesh[DATA], mp_policy=policy)


# ------------------------------------------------------------------------------------------- tensor parallel
def _divide_matrices(model: torch.nn.Module, world: World) -> None:
    """Divide the matrices that the model's plan names; the others stay whole on every tensor rank."""
    assert world.mesh is not None
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or {}
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if not plan:
        raise PlanError(
            f"parallel.tensor_parallelism={world.tensor_size}: the model {kind!r} does not say how it is divided (no "
            "tp_plan); use llama or qwen3, or tensor_parallelism=1"
        )
    _check_heads(model, world.tensor_size, kind)
    tied = _tied_output(model)
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        style = _style(plan, name)
        if style is not None and isinstance(module, torch.nn.Linear) and module is not tied:
            _check_width(name, module, style, world.tensor_size)
            styles[name] = _STYLES[style]()
    parallelize_module(model, world.mesh[TENSOR], styles)


_STYLES: Final[Mapping[str, Any]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
}


def _style(plan: Mapping[str, str], name: str) -> str | None:
    pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    style = plan.get(pattern) or plan.get(name)
    return style if style in _STYLES else None  # embeddings and norms: whole everywhere


def _check_heads(model: torch.nn.Module, size: int, kind: str) -> None:
    config = getattr(model, "config", model)
    heads = [getattr(config, name) for name in _HEADS if isinstance(getattr(config, name, None), int)]
    fitting = [n for n in range(1, min(heads, default=1) + 1) if all(count % n == 0 for count in heads)]
    if heads and size not in fitting:
        choices = ", ".join(map(str, fitting[:-1])) + (" or " if fitting[:-1] else "") + str(fitting[-1])
        there = " and ".join(map(str, sorted(set(heads))))
        raise PlanError(
            f"parallel.tensor_parallelism={size} does not divide the {there} heads of this {kind}: choose {choices}"
        )


def _check_width(name: str, module: torch.nn.Linear, style: str, size: int) -> None:
    """An output that is gathered again may be divided unevenly."""
    width = {"rowwise": module.in_features, "colwise": module.out_features}.get(style, size)
    if width % size:
        raise PlanError(
            f"parallel.tensor_parallelism={size} does not divide the {width} features of {name}: choose a divisor"
        )


def _tied_output(model: torch.nn.Module) -> torch.nn.Module | None:
    """An output layer that shares its matrix with the embedding: it stays whole, as the embedding does."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) in embeddings:
            return module
    return None
