"""What a task is: model, data, loss and metrics behind one Protocol, so that every run and every command
treats all tasks alike. Extension point: the registry in tasks/registry.py, or a user's own task by dotted
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, runtime_checkable

import numpy as np

from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan

if TYPE_CHECKING:  # the registry and the dummy task import this module in processes without torch
    import torch

TRAINING: Final = "training"
VALIDATION: Final = "validation"

Batch: TypeAlias = "Mapping[str, torch.Tensor]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run's materials, made once: by the server's worker, or by `manyhands train` for itself."""

    materials: Mapping[str, Path]  # file name -> file; all that `Task.open` needs
    samples: int  # training samples of an epoch
    parameters: tuple[Parameter, ...]
    first_weights: Path  # safetensors, fp32, names as in `parameters`


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """`mean`: scalar, to be differentiated. `count`: of what it is a mean over (tokens, samples), for averaging.

    `parts`: what it is made of, for people to see: 0-d means over the same, by name, always the same names.
    """

    mean: torch.Tensor
    count: int
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """Rows for people to read, each with the same columns: a confusion table, the worst errors."""

    name: str
    rows: tuple[Mapping[str, str | int | float], ...]


class Metrics:
    """What one evaluation accumulates beside the loss; made anew for each, so nothing is left over from the last.

    This class accumulates nothing; a task with metrics of its own derives from it. Between `add` and `values` the
    ranks of a training exchange their states, so `values` is that of all samples on every rank.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def add(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """A forward pass without gradients; the batch is on the model's device."""
        return self.task.loss(model, batch)

    def state(self) -> dict[str, np.ndarray]:
        """What `add` has gathered so far, as arrays."""
        return {}

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Replace what was gathered by that of all ranks, in their order, this one's among them."""

    def values(self) -> dict[str, float]:
        """Name -> figure, over everything gathered."""
        return {}

    def listings(self) -> tuple[Listing, ...]:
        """What a figure cannot say, over everything gathered."""
        return ()

    def picture(self) -> bytes | None:
        """A PNG of some predictions, where people would rather look than read."""
        return None


class Task(Protocol):
    """Opened from a directory of materials; holds data, builds models."""

    unit: str  # of Loss.count, in tables: "tokens", "samples"
    evaluation_sets: tuple[str, ...]  # splits to evaluate, the main one first; usually (VALIDATION,)

    def build_model(self) -> torch.nn.Module:
        """A new model; its weights are overwritten before use."""
        ...

    def samples(self, split: str = TRAINING) -> int: ...

    def batch(self, indices: np.ndarray, split: str = TRAINING) -> Batch:
        """The samples with these indices (int64) of a split, on the CPU."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss: ...

    def metrics(self, split: str) -> Metrics:
        """For one evaluation of `split`."""
        ...

    def tokens_per_sample(self) -> int: ...

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Write what a person keeps, from the model's parameters by name, on the CPU: for a language model, a
        directory that `transformers` loads.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A model by itself, read from what `Task.save_pretrained` wrote, and how it is called where there is no task.

    `model`: in evaluation mode, fp32, on the CPU. `call`: what a graph is made of, forward(**inputs) -> one tensor,
    or a tuple of them; often the model itself. `inputs`: an example. `axes`: by input, its dimensions that may have
    another size, and their names.
    """

    model: torch.nn.Module
    call: torch.nn.Module
    inputs: Mapping[str, torch.Tensor]
    axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]  # names of what `call` returns, in its order


@runtime_checkable
class LoadsSaved(Protocol):
    """What a TaskFamily may do too, so that its checkpoints can be exported."""

    def load_saved(self, directory: Path) -> Saved:
        """Raises DataError for a directory that is none of this family's, or broken."""
        ...


@runtime_checkable
class ChecksPlan(Protocol):
    """What a TaskFamily may do too, for settings that the plan's schema alone cannot judge."""

    def check(self, plan: Plan) -> None:
        """Reads no data. Raises PlanError."""
        ...


@runtime_checkable
class OrdersSamples(Protocol):
    """What a Task may do too: have an order of its training samples, other than data/permutation.py's."""

    def order(self, positions: np.ndarray, seed: int, epoch: int) -> np.ndarray:
        """The samples at these positions (int64 [n]) of an epoch: int64 [n]. A permutation of all samples for each
        seed and epoch, and a function of the arguments alone.
        """
        ...


@runtime_checkable
class Warns(Protocol):
    """What a Task may do too: say what a person should know of its data, before it is trained on."""

    warnings: tuple[str, ...]


@runtime_checkable
class KeepsDataApart(Protocol):
    """What a TaskFamily may do too, so that shards of its samples need neither all of its materials nor one model.

    Beside the shards of other families all materials and the first weights are kept, and no setting of the task may
    be changed when they are trained on.
    """

    def without_data(self, plan: Plan, materials: Path, directory: Path) -> None:
        """Write into `directory` of the materials what `prepare_model` and `open` need when samples are read
        elsewhere: little or none of the data itself.
        """
        ...

    def prepare_model(self, plan: Plan, directory: Path) -> Prepared:
        """The last part of `prepare`, over what `without_data` wrote: materials and first weights of the model of
        this plan, which may be another than that of the shards. `samples` counts nothing. Raises PlanError,
        DataError.
        """
        ...


class TaskFamily(Protocol):
    """How a kind of task is prepared and opened; one per name of the registry. It may be a `LoadsSaved` and a
    `ChecksPlan` too.
    """

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Read the sources, write the materials into `directory`. Raises DataError."""
        ...

    def open(self, plan: Plan, materials: Path) -> Task:
        """Open a task from a directory that holds the materials. Reads nothing else."""
        ...
