"""A model on many devices: tensor parallel, activation checkpointing, compiling, then FSDP2 or DDP around it.

All of it is torch's own (DTensor, fully_shard, DistributedDataParallel); what is here decides where each is applied,
from the model alone, so that a task need not know. A model's repeated blocks are the members of its longest list. How
its matrices are divided among tensor ranks it says itself, as `tp_plan`: module name with * for any number, and
colwise, rowwise, colwise_gather_output or replicated_with_grad_allreduce, the form of `transformers`.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
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
    trained: tuple[torch.nn.Parameter, ...] = field(init=False)
    """Its parameters that learn, in order: to look for them at each step costs a hundredth of a small one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained", tuple(p for p in self.model.parameters() if p.requires_grad))

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
        if not blocks:
            raise PlanError(
                "parallel.activation_checkpointing: this model has no repeated blocks, which are the members of a "
                "torch.nn.ModuleList, or of a torch.nn.Sequential of one class; leave it out"
            )
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
            find_unused_parameters=settings.parallel.unused_parameters,
            bucket_cap_mb=_CPU_BUCKET_MB if world.device.type == "cpu" else None,
            **_FIXED_BUFFERS,
        )
    return Parallelized(model=model, forward=forward)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's repeated blocks: the members of its longest outermost list, and of others that are as long.

    A list is a ModuleList, or a Sequential of members of one class. What lies within a block, as experts do, is its.
    """
    lists = [list(found.children()) for found in _outermost_lists(model)]
    longest = max(map(len, lists), default=0)
    return [block for blocks in lists if len(blocks) == longest for block in blocks]


def _outermost_lists(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    if _is_list(module):
        yield module
        return
    for child in module.children():
        yield from _outermost_lists(child)


def _is_list(module: torch.nn.Module) -> bool:
    members = list(module.children())
    if isinstance(module, torch.nn.Sequential):
        return len(members) > 1 and len({type(member) for member in members}) == 1
    return isinstance(module, torch.nn.ModuleList) and not any(
        isinstance(member, torch.nn.ModuleList) for member in members
    )


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
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    plan: Mapping[str, str] = getattr(model, "tp_plan", None) or _WITHOUT_HEADS.get(kind, {})
    if not plan:
        raise PlanError(
            f"parallel.tensor_parallelism={world.tensor_size}: the model {kind!r} does not say how it is divided (no "
            "tp_plan); use gpt2, llama or qwen3, or tensor_parallelism=1"
        )
    if kind not in _WITHOUT_HEADS:
        _check_heads(model, world.tensor_size, kind)
    tied = _tied_output(model)
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name)) or plan.get(name)
        if style is None:
            continue
        if style == _OF_HEADS:
            styles[name] = _OfLocalHeads()
        elif style in _STYLES and isinstance(module, torch.nn.Linear) and module is not tied:
            _check_width(name, (module.in_features, module.out_features), style, world.tensor_size)
            styles[name] = _STYLES[style]()
        elif style in _TRANSPOSED and _is_transposed(module):
            _check_width(name, tuple(module.weight.shape), style, world.tensor_size)
            styles[name] = _TRANSPOSED[style]()
        elif style not in _STYLES and style not in _WHOLE:
            raise PlanError(
                f"parallel.tensor_parallelism={world.tensor_size}: the model {kind!r} says that {name} is divided as "
                f"{style!r}, which is not known here; use gpt2, llama or qwen3, or tensor_parallelism=1"
            )
    if not styles:
        raise PlanError(
            f"parallel.tensor_parallelism={world.tensor_size}: this {kind!r} has no matrix of those that its tp_plan "
            "names; with an adapter (task.adapter) let the processes share the data (tensor_parallelism=1)"
        )
    parallelize_module(model, world.mesh[TENSOR], styles)


_WITHOUT_HEADS: Final[Mapping[str, Mapping[str, str]]] = {
    "gpt2": {"transformer.h.*.mlp.c_fc": "colwise", "transformer.h.*.mlp.c_proj": "rowwise"},
    "opt": {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"},
}
"""Models whose attention computes with all heads at once: their feed-forward parts, two thirds of a block's weights,
are divided, and the attention is whole on every tensor rank."""
_OF_HEADS: Final = "replicated_with_grad_allreduce"
_STYLES: Final[Mapping[str, Any]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
}
_WHOLE: Final = frozenset({
    "replicate", "embedding_rowwise", "embedding_colwise", "rowwise_split_input",
    "packed_colwise", "packed_rowwise", "moe_tp_experts",
})  # fmt: skip
"""What may as well stay whole on every tensor rank, since what goes into it is whole there: of these the experts."""


class _OfLocalHeads(SequenceParallel):
    """A norm of queries or keys: each rank applies the whole of it to its own heads; its gradient sums over all.

    To the norm, whatever comes before the last dimension is a batch; so the heads count as divided along the first.
    """

    def __init__(self) -> None:
        super().__init__(sequence_dim=0, use_local_output=True)

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        divided = super()._apply(module, device_mesh)
        for parameter in divided.parameters():
            parameter.register_post_accumulate_grad_hook(_sum_over_ranks)  # type: ignore[no-untyped-call]
        return divided


class _TransposedColwise(ColwiseParallel):
    """Of a layer that keeps its matrix as [in, out], as those of gpt2 do: the same, with the dimensions exchanged."""

    def _partition_linear_fn(self, name: str, module: torch.nn.Module, device_mesh: DeviceMesh) -> None:  # noqa: ARG002
        _distribute(module, device_mesh, weight=Shard(1), bias=Shard(0))

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        return _hooked(self, module, device_mesh)


class _TransposedRowwise(RowwiseParallel):
    """Likewise."""

    def _partition_linear_fn(self, name: str, module: torch.nn.Module, device_mesh: DeviceMesh) -> None:  # noqa: ARG002
        _distribute(module, device_mesh, weight=Shard(0), bias=Replicate())

    def _apply(self, module: torch.nn.Module, device_mesh: DeviceMesh) -> torch.nn.Module:
        self.desired_input_layouts = (Shard(-1),)
        return _hooked(self, module, device_mesh)


def _distribute(module: torch.nn.Module, mesh: DeviceMesh, **placements: Placement) -> None:
    for name, placement in placements.items():
        parameter = module.get_parameter(name)
        divided = distribute_tensor(parameter, mesh, [placement])
        module.register_parameter(name, torch.nn.Parameter(divided, requires_grad=parameter.requires_grad))


def _hooked(style: Any, module: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    return distribute_module(
        module,
        mesh,
        style._partition_linear_fn,
        partial(style._prepare_input_fn, style.input_layouts, style.desired_input_layouts),
        partial(style._prepare_output_fn, style.output_layouts, style.use_local_output),
    )


def _is_transposed(module: torch.nn.Module) -> bool:
    """Whether it is the Conv1D of transformers."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


_TRANSPOSED: Final[Mapping[str, Any]] = {"colwise": _TransposedColwise, "rowwise": _TransposedRowwise}


def _sum_over_ranks(parameter: torch.Tensor) -> None:
    """The gradient itself, where each rank has only its own part of the sum. FSDP does so by itself."""
    if isinstance(parameter.grad, DTensor):
        parameter.grad = parameter.grad.redistribute(placements=[Replicate()])


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


def _check_width(name: str, features: tuple[int, ...], style: str, size: int) -> None:
    """`features`: in and out. An output that is gathered again may be divided unevenly."""
    width = {"rowwise": features[0], "colwise": features[1]}.get(style, size)
    if width % size:
        fitting = [n for n in range(1, width + 1) if width % n == 0][:6]
        raise PlanError(
            f"parallel.tensor_parallelism={size} does not divide the {width} features of {name}: choose a divisor, "
            f"as {', '.join(map(str, fitting))}"
        )


def _tied_output(model: torch.nn.Module) -> torch.nn.Module | None:
    """An output layer that shares its matrix with the embedding: it stays whole, as the embedding does."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and id(module.weight) in embeddings:
            return module
    return None
