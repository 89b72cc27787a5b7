"""The inner optimizer of local steps, and its state as flat named tensors.

The state is named `<key>/<parameter>` with torch's keys (`step`, `exp_avg`, `exp_avg_sq`;
`momentum_buffer`), so that it travels through safetensors and comes back bit for bit. Weight decay is
decoupled and applies to tensors of two and more dimensions only: gains, biases and norms are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from manyhands.errors import StorageError
from manyhands.plan.schema import InnerOptimizer


def build_optimizer(settings: InnerOptimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD over the model's trainable parameters, as the plan says."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    decay = "decoupled_decay" if settings.name == "sgd" else "weight_decay"
    groups = [{"params": matrices, decay: settings.weight_decay}, {"params": vectors, decay: 0.0}]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return DecoupledSGD(groups, lr=settings.lr, momentum=settings.momentum)
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.lr, betas=betas, eps=settings.epsilon, fused=True)


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


def state_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Clones on the CPU. Empty for an optimizer that keeps nothing (SGD without momentum)."""
    return {
        f"{key}/{name}": value.detach().to("cpu", copy=True)
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
        optimizer.state[parameter][key] = tensor.detach().to(parameter.device, copy=True)
