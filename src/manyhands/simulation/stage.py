"""What a simulated run and a replay have in common: the prepared task, one trainer for all, and evaluation.

One trainer serves all participants in turn, since a trainer keeps nothing between two calls: weights and the inner
optimizer's state are handed to it each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyhands.coordination.types import Held
from manyhands.engine.device import choose_device
from manyhands.engine.evaluation import EvaluationResult, evaluate
from manyhands.engine.trainer import EngineTrainer, load_weights
from manyhands.engine.world import World
from manyhands.errors import PlanError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.simulation.recorded import RecordedRun
from manyhands.tasks.protocol import Task
from manyhands.tasks.registry import family_of
from manyhands.updates.participant import Participant, first_public, load_public, save_public


@dataclass(eq=False, slots=True, kw_only=True)
class Stage:
    """Made by `prepare` (a new task) or `open` (the materials of a run that was served)."""

    plan: Plan
    parameters: tuple[Parameter, ...]
    samples: int
    task: Task
    trainer: EngineTrainer
    first_snapshot: Path
    first_fingerprint: str

    @classmethod
    def prepare(
        cls, plan: Plan, directory: Path, *, device: str = "cpu", allowed_tasks: Sequence[str] = ()
    ) -> Stage:
        """Make the materials and the first snapshot in `directory`. Raises DataError, PlanError."""
        if plan.task.name == "dummy":
            raise PlanError("task.name is 'dummy', which has no model: there is nothing to simulate")
        directory.mkdir(parents=True, exist_ok=True)
        family = family_of(plan, allowed=allowed_tasks)
        made = family.prepare(plan, directory)
        first = directory / "first-snapshot.safetensors"
        fingerprint = save_public(first_public(plan, made.parameters, made.first_weights), first)
        task = family.open(plan, directory)
        return cls(
            plan=plan,
            parameters=tuple(made.parameters),
            samples=made.samples,
            task=task,
            trainer=EngineTrainer(task, plan, World(device=choose_device(device))),
            first_snapshot=first,
            first_fingerprint=fingerprint,
        )

    @classmethod
    def open(
        cls, run: RecordedRun, directory: Path, *, device: str = "cpu", allowed_tasks: Sequence[str] = ()
    ) -> Stage:
        """From the record of a served run; its materials are laid out in `directory`."""
        descriptor = run.descriptor
        if descriptor.plan.task.name == "dummy":
            raise PlanError(
                f"run '{descriptor.run_id}' has the task 'dummy', which has no model: there is nothing to replay"
            )
        family = family_of(descriptor.plan, allowed=allowed_tasks)
        task = family.open(descriptor.plan, run.lay_out(directory))
        return cls(
            plan=descriptor.plan,
            parameters=descriptor.parameters,
            samples=descriptor.samples,
            task=task,
            trainer=EngineTrainer(task, descriptor.plan, World(device=choose_device(device))),
            first_snapshot=run.first_snapshot,
            first_fingerprint=descriptor.first_fingerprint,
        )

    def participant(self, snapshot: Path, round_number: int = 0, held: Held | None = None) -> Participant:
        """A new one that starts from a snapshot taken after so many closings; its local state is fresh.

        `held`: what the snapshot holds; that of the first one is known.
        """
        made = Participant(
            self.plan,
            self.parameters,
            self.trainer,
            load_public(snapshot),
            device=str(self.trainer.device),
            micro_batch=self.trainer.micro_batch_size or 0,
        )
        made.load_public(snapshot, round_number, held or Held(self.first_fingerprint))
        return made

    def evaluate(self, snapshot: Path) -> EvaluationResult:
        """The validation loss of a snapshot."""
        load_weights(self.trainer.model, load_public(snapshot).weights)
        return evaluate(
            self.task,
            self.trainer.model,
            self.plan.evaluation.max_batches,
            self.plan.local.batch_size,
            world=World(device=self.trainer.device),
        )
