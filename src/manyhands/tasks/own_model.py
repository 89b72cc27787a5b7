"""Models that are built here, not by a package: how they are kept in a checkpoint, read again, and trained further.

A checkpoint holds the task's own description of the model, and beside it model.safetensors; or of a model that was
trained through an adapter that adapter, which names the checkpoint with the frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from manyhands.config import run_like
from manyhands.errors import DataError, PlanError
from manyhands.plan.fine_tuning import FineTuned, weights_here
from manyhands.tasks.adapter import base_of, merged, save_adapter, with_adapter
from manyhands.tasks.first_weights import first_model

WEIGHTS: Final = "model.safetensors"

Model = TypeVar("Model", bound=torch.nn.Module)


def opened_model(settings: FineTuned, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """What `build` builds, as the plan trains it: with an adapter beside it where there is one."""
    return build() if settings.adapter is None else with_adapter(build(), settings.adapter)


def begun_model(
    settings: FineTuned,
    seed: int,
    build: Callable[[], torch.nn.Module],
    load: Callable[[Path], tuple[torch.nn.Module, Mapping[str, Any]]],
    sizes: Mapping[str, Any],
) -> torch.nn.Module:
    """The model with its first weights: random ones from the seed, or those of `settings.weights`.

    `load`: the model of a checkpoint, and its sizes, by the names of `sizes`, which are those of the plan. Raises
    DataError for a checkpoint that is none, PlanError for one with a model of other sizes.
    """
    if settings.weights is None:
        return first_model(build, seed, settings.adapter)
    directory = checkpoint_at(settings.weights)
    model, theirs = load(directory)
    differ = [name for name, value in sizes.items() if theirs.get(name) != value]
    if differ:
        wanted = ", ".join(f"{name} {theirs.get(name)!r}, in the plan {sizes[name]!r}" for name in differ)
        raise PlanError(
            f"task.weights {settings.weights!r} are those of a model with {wanted}: give the plan the sizes of the "
            "weights, or leave task.weights out"
        )

    def make() -> torch.nn.Module:
        begun = build()
        begun.load_state_dict(model.state_dict())
        return begun

    return first_model(make, seed, settings.adapter)


def checkpoint_at(weights: str) -> Path:
    """The directory that `task.weights` names. Raises DataError where there is none."""
    directory = weights_here(weights)
    if directory is None:
        raise DataError(
            f"task.weights {weights!r}: there is no directory {Path(weights).expanduser()}, and no run of that name; "
            f"give a training or its checkpoint, as <training>/checkpoints/step-00001000.{run_like(weights)}"
        )
    return directory


def save_model(
    settings: FineTuned,
    build: Callable[[], torch.nn.Module],
    weights: Mapping[str, torch.Tensor],
    directory: Path,
) -> None:
    """Write what is kept of a model with these parameters into `directory`: all of them, or its adapter alone."""
    if settings.adapter is None:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / WEIGHTS)
        return
    with torch.device("meta"):
        model = with_adapter(build(), settings.adapter)
    base = weights_here(settings.weights or "") or settings.weights  # it outlives the working directory
    save_adapter(model, weights, str(base), directory)


def load_model(directory: Path, build: Callable[[Path], Model], what: str) -> Model:
    """The model of a checkpoint in evaluation mode, with an adapter merged into the weights that it was trained on.

    `build`: a new model as a checkpoint's description says. `what`: of which task, for messages. Raises DataError.
    """
    base = base_of(directory)
    try:
        model = build(directory)
        if base is None:
            model.load_state_dict(load_file(directory / WEIGHTS))
        else:
            model.load_state_dict(load_model(Path(base), build, what).state_dict())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{directory} holds no model of {what}: {error}; give a checkpoint that such a run wrote"
        ) from error
    return (model if base is None else cast(Model, merged(model, directory))).eval()
