"""How this machine, or these machines, carry out a training: everything that is not the plan's business.

The plan says what is computed and its hash covers all of it; these settings say with which processes, in which
precision, and what is logged and kept. They are composed together with the plan (plan/compose.py), so that one
command line sets both, and saved beside it. No torch here: the command line reads this module.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from manyhands.config import Settings

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Precision = Literal["fp32", "bf16", "pure_bf16"]
CompileMode = Literal["off", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Parallel(Settings):
    """How several processes share the work of one training."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model; fsdp: parameters, gradients and optimizer state are sharded
    (FSDP2). A process alone needs neither; with tensor_parallelism, data ranks shard in any case."""
    data_parallelism: Count | None = None
    """Processes that divide each step's samples; null: all of them, over tensor_parallelism."""
    tensor_parallelism: Count = 1
    """Processes that divide each layer's matrices; must divide the model's heads."""
    micro_batch_size: Count | None = None
    """Samples of one forward pass on one process; null: all of its share of a step at once. Gradients of several
    are accumulated."""
    unused_parameters: bool = False
    """Let DDP look at every step for parameters that took no part in it; needed where a model has such."""
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass instead of keeping them: less memory, a third
    more time."""


class Execution(Settings):
    """Devices, precision, and what to do when something goes wrong."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N. With several processes rank r uses the r-th device of this machine."""
    precision: Precision = "fp32"
    """fp32; bf16: autocast, weights and optimizer in fp32; pure_bf16: weights and optimizer in bf16 too."""
    accumulate_in_fp32: bool = True
    """Keep the sum of several micro-batches' gradients in fp32, where they are bf16."""
    compile: CompileMode = "off"
    """torch.compile, and its mode."""
    threads: Count | None = None
    """CPU threads of each process; null: as torch chooses, shared among the processes of this machine."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss that is not finite: stop with its step named, or leave that step out on every process. skip waits for
    the device at every step."""
    wait_for_ranks_s: Positive = 120.0
    """How long processes wait for each other when they meet."""
    rank_timeout_s: Positive = 600.0
    """How long processes wait at a step for one that stands still. One that dies is noticed at once."""
    run_in_docker: bool = False
    """On another host (--host): in the container that its DockerLaunchCommand enters."""
    restarts: Annotated[int, Field(ge=0)] = 2
    """How often processes that died are started again from the last checkpoint."""

    @field_validator("device", mode="before")
    @classmethod
    def _no_index(cls, device: object) -> object:
        if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
            raise ValueError(
                f"expected auto, cpu, cuda or cuda:N; for the GPU of this index give --device cuda:{device}, or "
                f"--devices {device}"
            )
        return device


class Logging(Settings):
    """Where figures go beside events.jsonl, which is always written."""

    every_steps: Count = 10
    """Optimizer steps between two reports, which also come before each evaluation and checkpoint; on a GPU each one
    waits for the device."""
    optim_stats_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between reports of weights', gradients' and optimizer states' norms by tensor; 0: none."""
    tensorboard: bool = False
    """Write event files of tensorboard into the run's directory (extra: tensorboard)."""
    wandb_project: str | None = None
    """Report to this project of Weights & Biases (extra: wandb); WANDB_MODE=offline keeps it on this machine."""
    wandb_run: str | None = None
    """Name of the run there; null: the name of the run here."""
    wandb_group: str | None = None
    """Group of the run there."""
    wandb_entity: str | None = None
    """User or team that owns the project."""

    @model_validator(mode="after")
    def _project_first(self) -> Logging:
        if self.wandb_project is None and (self.wandb_run or self.wandb_group or self.wandb_entity):
            raise ValueError("wandb_run, wandb_group and wandb_entity need wandb_project")
        return self


class Checkpoints(Settings):
    """What is kept of a training."""

    keep: Count = 2
    """Checkpoints that stay; older ones are removed once a newer one is whole."""
    asynchronous: bool = True
    """Write while training goes on; the step waits only for the copy out of the model."""


class Start(Settings):
    """Which processes to start, or which of them this one is; and where the training's directory is."""

    run: Identifier | None = None
    """Name of the training, hence of its directory; null: the plan's name and six hex digits."""
    resume: Annotated[str, Field(min_length=1)] | None = None
    """A checkpoint or a directory to go on from; latest: this training's newest, if it has one."""
    processes: Count | None = None
    """Start so many processes on this machine; null: as many as data_parallelism and tensor_parallelism need."""
    nodes: Count | None = None
    """So many machines start their processes for this training, each with its own node_rank."""
    node_rank: Annotated[int, Field(ge=0)] | None = None
    """This machine's number among nodes; 0 is at master_addr."""
    rank: Annotated[int, Field(ge=0)] | None = None
    """This process's number among world_size that are started by hand."""
    world_size: Count | None = None
    """How many processes are started by hand."""
    master_addr: str | None = None
    """Where rank 0 is; null: the processes find each other through a file in the training's directory."""
    master_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """The port of rank 0 there."""

    def by_hand(self) -> bool:
        """Whether each process is started by itself: with its rank, or by torchrun."""
        return self.rank is not None or "RANK" in os.environ

    @model_validator(mode="after")
    def _goes_together(self) -> Start:
        if (self.rank is None) != (self.world_size is None):
            raise ValueError("rank and world_size belong together: give both")
        if self.rank is not None and self.world_size is not None and self.rank >= self.world_size:
            raise ValueError(
                f"rank {self.rank} of {self.world_size}: ranks go from 0 to {self.world_size - 1}"
            )
        if self.rank is not None and self.processes is not None:
            raise ValueError(
                "processes starts them here, rank is for those started by hand: give one of the two"
            )
        if (self.nodes is None) != (self.node_rank is None):
            raise ValueError("nodes and node_rank belong together: give both")
        if self.nodes is not None and self.node_rank is not None:
            if self.node_rank >= self.nodes:
                raise ValueError(
                    f"node_rank {self.node_rank} of {self.nodes}: they go from 0 to {self.nodes - 1}"
                )
            if self.master_addr is None or self.rank is not None:
                raise ValueError(
                    "nodes starts processes on several machines: give master_addr and master_port, and no rank"
                )
        if (self.master_addr is None) != (self.master_port is None):
            raise ValueError("master_addr and master_port belong together: give both, or none")
        return self


class EngineSettings(Settings):
    """All of it, under the names that a command line uses."""

    parallel: Parallel = Parallel()
    """How several processes share the work."""
    exec: Execution = Execution()
    """Devices, precision, and what to do when something goes wrong."""
    logging: Logging = Logging()
    """Where figures go."""
    checkpoints: Checkpoints = Checkpoints()
    """What is kept."""

    def common(self) -> dict[str, Any]:
        """What all processes of a training must have alike. How each machine compiles is its own affair."""
        return self.model_dump(mode="json", exclude={"exec": {"compile"}})
