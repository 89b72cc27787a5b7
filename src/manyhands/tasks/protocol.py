"""What a task is: model, data, loss and metrics behind one Protocol, so that every run and every command
treats all tasks alike. Extension point: the registry in tasks/registry.py, or a user's own task by dotted
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan

if TYPE_CHECKING:  # the registry and the dummy task import this module in processes without torch
    import torch

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
    """`mean`: scalar, to be differentiated. `count`: of what it is a mean over (tokens, samples), for
    averaging.
    """

    mean: torch.Tensor
    count: int
    metrics: Mapping[str, float]


class Task(Protocol):
    """Opened from a directory of materials; holds data, builds models."""

    unit: str  # of Loss.count, in tables: "tokens", "samples"

    def build_model(self) -> torch.nn.Module:
        """A new model; its weights are overwritten before use."""
        ...

    def training_samples(self) -> int: ...

    def validation_samples(self) -> int: ...

    def batch(self, indices: np.ndarray, *, validation: bool = False) -> Batch:
        """The samples with these indices (int64), on the CPU."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss: ...

    def tokens_per_sample(self) -> int: ...

    def save_pretrained(self, model: torch.nn.Module, directory: Path) -> None:
        """Write what a person keeps: for a language model, a directory that `transformers` loads."""
        ...


class TaskFamily(Protocol):
    """How a kind of task is prepared and opened; one per name of the registry."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Read the sources, write the materials into `directory`. Raises DataError."""
        ...

    def open(self, plan: Plan, materials: Path) -> Task:
        """Open a task from a directory that holds the materials. Reads nothing else."""
        ...
