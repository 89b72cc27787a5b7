"""What a simulated run and a replay have in common: the prepared task, one trainer for all, and evaluation.

One trainer serves all participants in turn, since a trainer keeps nothing between two calls: weights and the inner
optimizer's state are handed to it each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from manyhands.coordination.types import Closed
from manyhands.engine.device import choose_device
from manyhands.engine.evaluation import EvaluationResult, evaluate
from manyhands.engine.trainer import EngineTrainer, load_weights
from manyhands.errors import PlanError
from manyhands.plan.compatibility import check
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
    def prepare(cls, plan: Plan, directory: Path, *, device: str, allowed: Sequence[str] = ()) -> Stage:
        """Make the materials in `directory`."""
        check(plan)
        if plan.task.name == "dummy":
            raise PlanError("task.name is 'dummy', which has no model: there is nothing to simulate")
        directory.mkdir(parents=True, exist_ok=True)
        family = family_of(plan, allowed=allowed)
        made = family.prepare(plan, directory)
        first = directory / "first-snapshot.safetensors"
        fingerprint = save_public(first_public(plan, made.parameters, made.first_weights), first)
        task = family.open(plan, directory)
        return cls(
            plan=plan,
            parameters=tuple(made.parameters),
            samples=made.samples,
            task=task,
            trainer=EngineTrainer(task, plan, choose_device(device)),
            first_snapshot=first,
            first_fingerprint=fingerprint,
        )

    @classmethod
    def open(cls, run: RecordedRun, directory: Path, *, device: str) -> Stage:
        """From the record of a served run; its materials are laid out in `directory`."""
        descriptor = run.descriptor
        task = family_of(descriptor.plan).open(descriptor.plan, run.lay_out(directory))
        return cls(
            plan=descriptor.plan,
            parameters=descriptor.parameters,
            samples=descriptor.samples,
            task=task,
            trainer=EngineTrainer(task, descriptor.plan, choose_device(device)),
            first_snapshot=run.first_snapshot,
            first_fingerprint=descriptor.first_fingerprint,
        )

    def participant(self, snapshot: Path) -> Participant:
        """A new one, whose public is a snapshot; its local state is fresh."""
        device = str(self.trainer.device)
        made = Participant(self.plan, self.parameters, self.trainer, load_public(snapshot), device=device)
        made.load_public(snapshot, 0)
        return made

    def evaluate(self, snapshot: Path) -> EvaluationResult:
        load_weights(self.trainer.model, load_public(snapshot).weights)
        return evaluate(
            self.task,
            self.trainer.model,
            self.plan.evaluation.max_batches,
            self.plan.local.batch_size,
            device=self.trainer.device,
        )


def close(participant: Participant, closed: Closed, paths: Sequence[Path]) -> str:
    """Apply a closing, from its change (star) or the counted updates (mesh); the fingerprint afterwards."""
    if closed.change is not None:
        return participant.close(closed.closing, change_path=paths[0])
    return participant.close(closed.closing, update_paths=paths)
