"""Which checkpoint a command line means: a directory, a training's or a run's newest, or a run by its name; and which
plan and materials it is from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from manyhands.config.checkpoint_names import RUN, TRAINING, numbered
from manyhands.errors import DataError, PlanError, StorageError
from manyhands.ui.plans import no_run_at, run_at, training_of

if TYPE_CHECKING:
    from manyhands.plan.schema import Plan

_MARKS: Final = ("config.json", "adapter_config.json", "table.json", "training.json", "*.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What a checkpoint was trained with. `materials`: a directory as the task opens it."""

    plan: Plan
    materials: Path


def locate(where: str) -> Path:
    """The checkpoint of that path, or the newest one of the training's or run's directory, or of the run so named.

    Raises StorageError for a name that is nothing here, and for a directory without checkpoints.
    """
    path = run_at(where)
    if not path.is_dir():
        raise StorageError(
            f"{no_run_at(where)} A run keeps its checkpoints in the MANYHANDS_HOME of its server, whatever its "
            "--data-dir: set it, or give the path of a checkpoint"
        )
    found = numbered(path, TRAINING, RUN) or numbered(path / "checkpoints", TRAINING, RUN)
    if not found and not any(next(path.glob(mark), None) for mark in _MARKS):
        raise StorageError(
            f"no checkpoint in {path}: a directory step-<number> or round-<number>, or one that holds such, was "
            "expected"
        )
    return found[-1] if found else path


def origin_of(checkpoint: Path, shards: Path | None = None) -> Origin | None:
    """That of a training, from its directory, or of a run that was served from here; None for what lies elsewhere.

    shards: where those of the training are. Raises PlanError for ones that it has no use for, DataError where the
    materials are still on the host that trained.
    """
    from manyhands.engine.configuration import kept_configuration
    from manyhands.hosts.record import recorded
    from manyhands.plan.resolve import PLAN_FILE, read_plan_file, resolve

    training = training_of(str(checkpoint))
    if training is not None and (training / PLAN_FILE).is_file():
        plan = kept_configuration(training).plan
        materials = training / "materials"
        if not materials.is_dir() and recorded(training) is not None:
            raise DataError(
                f"{training} was trained on another host, where its prepared data still is: fetch it with `manyhands "
                f"hosts fetch {training.name} --all`"
            )
        return Origin(plan=_on(plan, shards), materials=materials)
    run = checkpoint.resolve().parent.parent
    materials = run / "server" / "evaluator"
    if not (materials.is_dir() and (run / PLAN_FILE).is_file()):
        return None
    plan = resolve(read_plan_file(run / PLAN_FILE), where=str(run / PLAN_FILE))
    return Origin(plan=_on(plan, shards), materials=materials)


def _on(plan: Plan, shards: Path | None) -> Plan:
    if shards is None:
        return plan
    if plan.data.shards is None:
        raise PlanError(f"--shards {shards}: this model was not trained on shards; leave it out")
    return plan.model_copy(update={"data": plan.data.model_copy(update={"shards": str(shards.resolve())})})
