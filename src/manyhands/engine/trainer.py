"""A client's work on a model: the Trainer that updates/ asks for (updates.types.Trainer).

One instance holds one model for as long as its process lives; each call loads the given weights into it, so
nothing is left over from the call before. The same arguments on the same machine with the same threads, on as many
ranks, give the same bits: the global generator is seeded from the assignment, and the order of data comes from the
plan.

In a group of processes each has an instance, and all make the same calls with the same assignment and terms. What
else goes into the work is rank 0's and is shared from there; every rank gets all of the result. They agree between
micro-batches on giving work up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from manyhands.coordination.types import Assignment, RoundTerms
from manyhands.data.ranges import indices_of
from manyhands.engine.optimizer import build_optimizer, restore_state, state_of
from manyhands.engine.parallel import parallelize
from manyhands.engine.report import optimizer_stats
from manyhands.engine.settings import EngineSettings, Execution, Parallel, Precision
from manyhands.engine.sharding import like, whole
from manyhands.engine.step import Steering, Step, training_step
from manyhands.engine.world import ALONE, World
from manyhands.errors import PlanError, WorkerError
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import Batch, Task
from manyhands.updates.seeds import seed_generators, seed_of
from manyhands.updates.types import Tensors, Trained

LOOK_EVERY_STEPS = 10
"""On a GPU losses are read only so often: each reading waits for the device. On a CPU every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """After `step` of `steps` of an assignment; `loss` is the mean of the steps since the last report."""

    step: int
    steps: int
    loss: float
    samples: int  # so far
    tokens: int  # so far


class EngineTrainer:
    """Runs assignments of a plan's task, alone or as one of the ranks of `world`.

    `abandoned` is asked between micro-batches and makes the work end in updates.types.Abandoned, on all ranks.
    `micro_batch_size` splits a rank's samples of a step where they do not fit into memory at once (None: all at
    once); each replica's share of a step is as even as it can be. `on_progress` is rank 0's, and so is `on_stats`,
    which hears of the norms of tensors after every `stats_every`-th step of the run (0: never). Raises PlanError
    where the model or the steps cannot be divided among the ranks.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        world: World = ALONE,
        *,
        precision: Precision = "fp32",
        micro_batch_size: int | None = None,
        abandoned: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Progress], None] | None = None,
        stats_every: int = 0,
        on_stats: Callable[[int, dict[str, dict[str, float]]], None] = lambda _step, _stats: None,
    ) -> None:
        self.task = task
        self.plan = plan
        self.world = world
        self.device = world.device
        self.precision: Precision = precision
        self.micro_batch_size = micro_batch_size
        self.abandoned = abandoned
        self.on_progress = on_progress if world.leads else None
        self.stats_every, self.on_stats = stats_every, on_stats
        if plan.local.batch_size < world.data_size:
            raise PlanError(
                f"local.batch_size={plan.local.batch_size} of this run cannot be divided among {world.data_size} "
                "replicas: choose fewer (--data-parallelism)"
            )
        model = task.build_model().train()
        settings = EngineSettings(
            parallel=Parallel(tensor_parallelism=world.tensor_size), exec=Execution(precision=precision)
        )
        self._parallelized = parallelize(model, world, settings)
        self.model = self._parallelized.model
        self.optimizer = build_optimizer(plan.local.optimizer, self.model)

    def train(
        self,
        weights: Tensors,
        inner: Mapping[str, torch.Tensor] | None,
        assignment: Assignment,
        terms: RoundTerms,
        *,
        correction: Tensors | None = None,
        proximal: float = 0.0,
    ) -> Trained:
        """See updates.types.Trainer. The end weights are those of the trainable parameters; all are CPU clones."""
        if assignment.steps > len(terms.learning_rates):
            raise PlanError(
                f"assignment {assignment.id} has {assignment.steps} steps, and round {terms.round} has "
                f"{len(terms.learning_rates)} learning rates; at most local.steps can be assigned"
            )
        self._begin(weights, assignment)
        restore_state(self.optimizer, self.model, self.world.share(inner))
        correction, proximal = self.world.share(correction), self.world.told(proximal)
        steering = Steering(
            clip_norm=self.plan.local.optimizer.clip_norm,
            correction=None if correction is None else self._like_parameters(correction),
            anchor=[p.detach().clone() for p in self._trainable().values()] if proximal > 0 else None,
            proximal=proximal,
        )
        watch = _Watch(self, assignment)
        for i, indices in enumerate(self._steps(assignment)):
            step = training_step(
                self.task,
                self._parallelized,
                self._micro_batches(indices),
                optimizer=self.optimizer,
                learning_rate=terms.learning_rates[i],
                steering=steering,
                world=self.world,
                precision=self.precision,
                reference_count=self._reference_count(assignment),
                abandoned=self._all_abandon(),
            )
            watch.saw(step, assignment.batch_size)
            self._tell_stats(terms.first_step + i + 1)
        self.model.zero_grad(set_to_none=True)
        return watch.trained(
            {name: _on_cpu(parameter) for name, parameter in self._trainable().items()},
            state_of(self.optimizer, self.model),
        )

    def _tell_stats(self, step: int) -> None:
        if self.stats_every == 0 or step % self.stats_every:
            return
        stats = optimizer_stats(self.model, self.optimizer)
        if self.world.leads:
            self.on_stats(step, stats)

    def gradient(self, weights: Tensors, assignment: Assignment) -> Trained:
        """The mean gradient over all the assignment's samples, steps of batch_size being its micro-batches."""
        self._begin(weights, assignment)
        watch = _Watch(self, assignment)
        batches = (batch for indices in self._steps(assignment) for batch in self._micro_batches(indices))
        step = training_step(
            self.task,
            self._parallelized,
            batches,
            optimizer=None,
            world=self.world,
            precision=self.precision,
            reference_count=self._reference_count(assignment),
            abandoned=self._all_abandon(assignment.steps),
        )
        watch.saw(step, assignment.steps * assignment.batch_size)
        gradients = {
            name: torch.zeros(parameter.shape) if parameter.grad is None else _on_cpu(parameter.grad)
            for name, parameter in self._trainable().items()
        }
        self.model.zero_grad(set_to_none=True)
        return watch.trained(gradients, None)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def _begin(self, weights: Tensors, assignment: Assignment) -> None:
        """With rank 0's weights, and random numbers that differ between replicas, which see different samples."""
        load_weights(self.model, self.world.share(weights) or {})
        rank = self.world.data_rank
        seed_generators(assignment.seed if rank == 0 else seed_of(assignment.seed, rank))

    def _all_abandon(self, steps: int = 1) -> Callable[[], bool]:
        """To be asked before each micro-batch of so many steps. All ranks agree, so they agree as often as the one
        with the fewest micro-batches is asked."""
        share = self.plan.local.batch_size // self.world.data_size
        times = iter(range(steps * math.ceil(share / (self.micro_batch_size or share))))
        return lambda: next(times, None) is not None and self.world.any(self.abandoned())

    def _like_parameters(self, tensors: Tensors) -> list[torch.Tensor]:
        """In the order and on the device of the trainable parameters."""
        return [like(parameter, tensors[name]) for name, parameter in self._trainable().items()]

    def _steps(self, assignment: Assignment) -> Iterator[npt.NDArray[np.int64]]:
        """This replica's samples of each step, [batch_size / replicas, rounded up for the first ones]."""
        indices = self._indices(assignment)
        wanted = assignment.steps * assignment.batch_size
        if len(indices) != wanted:
            raise PlanError(
                f"assignment {assignment.id} has ranges of {len(indices)} samples, and {assignment.steps} steps of "
                f"{assignment.batch_size} need {wanted}"
            )
        for step in indices.reshape(assignment.steps, assignment.batch_size):
            yield np.array_split(step, self.world.data_size)[self.world.data_rank]

    def _indices(self, assignment: Assignment) -> npt.NDArray[np.int64]:
        total = self.task.samples()
        if self.plan.data.kind == "local":  # the data is the client's own: the assignment's seed orders it
            generator = np.random.default_rng(assignment.seed)
            return generator.integers(0, total, assignment.steps * assignment.batch_size, dtype=np.int64)
        return indices_of(assignment.ranges, total, self.plan.seed)

    def _micro_batches(self, indices: npt.NDArray[np.int64]) -> Iterator[Batch]:
        size = self.micro_batch_size or len(indices)
        for start in range(0, len(indices), size):
            yield self.task.batch(indices[start : start + size])

    def _reference_count(self, assignment: Assignment) -> int | None:
        """What a replica's whole share counts for at most, alike on every rank; None for a process alone."""
        if self.world.data_size == 1:
            return None
        return math.ceil(assignment.batch_size / self.world.data_size) * self.task.tokens_per_sample()


class _Watch:
    """Keeps the losses of an assignment, reads them now and then, and stops at one that is not finite."""

    def __init__(self, trainer: EngineTrainer, assignment: Assignment) -> None:
        self._trainer, self._assignment = trainer, assignment
        self._every = 1 if trainer.device.type == "cpu" else LOOK_EVERY_STEPS
        self._unread: list[tuple[torch.Tensor, int]] = []
        self._losses: list[float] = []
        self._counts: list[int] = []
        self._samples = 0

    def saw(self, step: Step, samples: int) -> None:
        self._unread.append((step.loss, step.count))
        self._samples += samples
        if len(self._unread) >= self._every:
            self._read()

    def _read(self) -> None:
        if not self._unread:
            return
        losses = torch.stack([loss for loss, _ in self._unread]).tolist()
        for loss in losses:
            if not math.isfinite(loss):
                raise WorkerError(
                    f"the loss is {loss} at step {len(self._losses)} of assignment {self._assignment.id} (round "
                    f"{self._assignment.round}): lower local.optimizer.lr, or look at the data of that step"
                )
            self._losses.append(loss)
        self._counts += [count for _, count in self._unread]
        self._unread.clear()
        if self._trainer.on_progress is not None:
            self._trainer.on_progress(
                Progress(
                    step=len(self._losses),
                    steps=self._assignment.steps,
                    loss=math.fsum(losses) / len(losses),
                    samples=self._samples,
                    tokens=self._samples * self._trainer.task.tokens_per_sample(),
                )
            )

    def trained(self, tensors: Tensors, inner: Mapping[str, torch.Tensor] | None) -> Trained:
        self._read()
        counts = self._trainer.world.sum_over_data(
            torch.tensor(self._counts, dtype=torch.float64, device=self._trainer.device)
        ).tolist()
        loss = math.fsum(a * n for a, n in zip(self._losses, counts, strict=True)) / sum(counts)
        return Trained(
            tensors=tensors,
            inner=inner,
            loss=loss,
            tokens=self._samples * self._trainer.task.tokens_per_sample(),
            samples=self._samples,
            steps=len(self._losses),
        )


def load_weights(model: torch.nn.Module, weights: Tensors) -> None:
    """Copy `weights` into the model's parameters, in place. Raises WorkerError if names or shapes differ."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        odd = min(parameters.keys() ^ weights.keys())
        side = "the model" if odd in parameters else "the weights"
        raise WorkerError(
            f"weights do not fit the model: {odd!r} is only in {side}; compare plan and snapshot"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.shape != weights[name].shape:
                raise WorkerError(
                    f"weights do not fit the model: {name!r} has shape {list(weights[name].shape)}, the model's is "
                    f"{list(parameter.shape)}; compare plan and snapshot"
                )
            parameter.copy_(like(parameter, weights[name]))


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).to("cpu", torch.float32, copy=True).contiguous()
