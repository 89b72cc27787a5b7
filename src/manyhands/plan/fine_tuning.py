"""What a plan says about where a model's first weights come from, and which of them are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import LocalPath, Settings, runs_directory
from manyhands.config.checkpoint_names import RUN, TRAINING, numbered

Count = Annotated[int, Field(ge=1)]


class Adapter(Settings):
    """A small trainable part in a frozen model: only its tensors are trained and travel."""

    name: Literal["lora"] = "lora"
    """lora: low-rank matrices beside the model's own (Hu et al. 2021), by the package `peft`."""
    rank: Count = 8
    """Inner dimension of the two matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """Their product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before them, while training."""
    targets: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Names of the modules to adapt, or the last parts of their names, such as q_proj; none: all linear layers,
    of a language model all but the output."""


class FineTuned(Settings):
    """A task whose model may start from existing weights, and be trained whole or through an adapter."""

    name: str
    weights: LocalPath | None = None
    """Existing weights to start from: a checkpoint of a training of this task, by its directory or, for the newest,
    that of the training, with a model of the same sizes; null: random weights."""
    adapter: Adapter | None = None
    """Train this beside the frozen weights; null: train all weights."""


def weights_here(weights: str) -> Path | None:
    """The directory that `task.weights` names on this machine: a path, or one below the runs here; of a training's
    directory, its newest checkpoint. None for a name on the Hub, and for what is not here.
    """
    places = (Path(weights).expanduser(), runs_directory() / weights)
    found = next((place.resolve() for place in places if place.is_dir()), None)
    if found is None:
        return None
    if any(found.glob("*.safetensors")):  # a model by itself, whatever lies beside it
        return found
    kept = numbered(found, TRAINING, RUN) or numbered(found / "checkpoints", TRAINING, RUN)
    return kept[-1] if kept else found
