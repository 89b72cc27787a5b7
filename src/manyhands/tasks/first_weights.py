"""The first weights of a run: random ones from the plan's seed, or existing ones, and an adapter beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from manyhands.plan.descriptor import Parameter
from manyhands.plan.fine_tuning import Adapter
from manyhands.tasks.adapter import with_adapter

FIRST_WEIGHTS: Final = "first.safetensors"


def first_model(make: Callable[[], torch.nn.Module], seed: int, adapter: Adapter | None) -> torch.nn.Module:
    """What `make` makes, with an adapter beside it where one is given; what is random in either is of the seed alone.
    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        torch.manual_seed(seed)
        return model if adapter is None else with_adapter(model, adapter)


def write_first_weights(model: torch.nn.Module, directory: Path) -> tuple[Parameter, ...]:
    """Write FIRST_WEIGHTS into `directory`: the model's parameters, tied ones once; and what they are."""
    parameters = dict(model.named_parameters())
    save_file({name: p.detach().contiguous() for name, p in parameters.items()}, directory / FIRST_WEIGHTS)
    return tuple(
        Parameter(name=name, shape=tuple(p.shape), trainable=p.requires_grad)
        for name, p in parameters.items()
    )
