"""The inner optimizer of local steps, and its state as flat named tensors.

The state is named `<key>/<parameter>` with torch's keys (`step`, `exp_avg`, `exp_avg_sq`;
`momentum_buffer`), so that it travels through safetensors and comes back bit for bit. Weight decay is
decoupled and applies to tensors of two and more dimensions only: gains, biases and norms are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from manyhands.engine.sharding import like, whole
from manyhands.errors import StorageError
from manyhands.plan.schema import InnerOptimizer


def build_optimizer(settings: InnerOptimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (fused), SGD or Muon over the model's trainable parameters, as the plan says."""
    if settings.name == "muon":
        return MuonWithAdamW(model, settings)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.name == "sgd":
        groups = _groups(parameters, settings.weight_decay, "decoupled_decay")
        return DecoupledSGD(groups, lr=settings.lr, momentum=settings.used_momentum)
    return _adamw(parameters, settings)


def _adamw(parameters: Sequence[torch.nn.Parameter], settings: InnerOptimizer) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        _groups(parameters, settings.weight_decay),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def _groups(
    parameters: Sequence[torch.nn.Parameter], decay: float, key: str = "weight_decay"
) -> list[dict[str, Any]]:
    """By whether they decay, and by whether they are sharded: a fused step takes only tensors of one kind."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        kind = (parameter.ndim < 2, isinstance(parameter, DTensor))
        groups.setdefault(kind, []).append(parameter)
    return [
        {"params": members, key: 0.0 if flat else decay}
        for (flat, _), members in sorted(groups.items(), key=lambda group: group[0])
    ]


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of hidden layers, AdamW for embeddings, output layer and vectors.

    Both are torch's. Muon's step is scaled to AdamW's size (match_rms_adamw, Liu et al. 2502.16982), so one learning
    rate and weight decay serve both.
    """

    def __init__(self, model: torch.nn.Module, settings: InnerOptimizer) -> None:
        hidden = _hidden_matrices(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p in hidden]
        others = [p for p in trainable if p not in hidden]
        decay = settings.weight_decay
        self._parts: list[torch.optim.Optimizer] = []
        if matrices:
            self._parts.append(
                torch.optim.Muon(
                    matrices,
                    lr=settings.lr,
                    momentum=settings.used_momentum,
                    weight_decay=decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            self._parts.append(_adamw(others, settings))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.param_groups = [
            group for part in self._parts for group in part.param_groups
        ]  # theirs, not copies
        for part in self._parts:
            part.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step(closure)


def _hidden_matrices(model: torch.nn.Module) -> set[torch.nn.Parameter]:
    """Matrices that are neither an embedding nor an output layer: that of a language model, or those that the model
    names, by the last part of their names, in `not_hidden`.
    """
    outside = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    named = getattr(model, "not_hidden", ())
    outside |= {id(m.weight) for name, m in model.named_modules() if name.rpartition(".")[2] in named}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None:
        outside.add(id(output.weight))
    return {p for p in model.parameters() if p.ndim == 2 and id(p) not in outside}


class DecoupledSGD(torch.optim.SGD):
    """torch's SGD, with a weight decay that shrinks the weights by lr * decay instead of joining the
    gradient.

    As in AdamW (Loshchilov and Hutter, 1711.05101), so the plan's weight_decay means the same for both. The
    decay is `decoupled_decay` of a parameter group.
    """

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                kept = 1.0 - group["lr"] * group["decoupled_decay"]
                for parameter in group["params"]:
                    if kept != 1.0 and parameter.grad is not None:
                        parameter.mul_(kept)
        super().step(closure)


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make the state that its first step would, with weights unchanged: to load one into.

    A step of zero gradients with a learning rate of zero, as torch.distributed.checkpoint does.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        parameter.grad = None


def state_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Clones on the CPU, whole. Empty for an optimizer that keeps nothing (SGD without momentum)."""
    return {
        f"{key}/{name}": whole(value.detach()).to("cpu", copy=True)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def restore_state(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, state: Mapping[str, torch.Tensor] | None
) -> None:
    """Make the optimizer what it was when `state_of` was taken; None starts it from scratch.

    Raises StorageError for a state that is not of this model and optimizer.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer.state.clear()
    for full_name, tensor in (state or {}).items():
        key, _, name = full_name.partition("/")
        parameter = parameters.get(name)
        expected = () if key == "step" else None if parameter is None else tuple(parameter.shape)
        if parameter is None or tuple(tensor.shape) != expected:
            raise StorageError(
                f"the inner optimizer's state has {full_name!r} of shape {list(tensor.shape)}, which this model has "
                "no place for: it belongs to another run; delete the saved local state"
            )
        placed = tensor.to(parameter.device) if key == "step" else like(parameter, tensor)
        optimizer.state[parameter][key] = placed.detach().clone()
