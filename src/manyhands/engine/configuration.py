"""A training's configuration: the plan and the engine's settings, composed together and told apart by their keys.

    manyhands train task=grids optimizer.lr=3e-4 parallel.strategy=fsdp processes=2

One composition (plan/compose.py) gives plain data for both; the keys of `EngineSettings` and `Start` are taken out,
and what is left is the plan. Kept beside a training as plan.yaml and engine.yaml, which its other processes and a
resume read. No torch here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from manyhands.config import did_you_mean
from manyhands.engine.settings import EngineSettings, Start
from manyhands.errors import PlanError
from manyhands.identity.canonical import digest
from manyhands.plan.choices import overlay
from manyhands.plan.compose import apply_overrides, compose_data
from manyhands.plan.fine_tuning import FineTuned, weights_here
from manyhands.plan.needs import Package, packages_of
from manyhands.plan.resolve import PLAN_FILE, dump_plan, plan_hash, read_plan_file, resolve
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import MODEL_SETTINGS

ENGINE_FILE = "engine.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """What to train, with what, and as which process."""

    plan: Plan
    settings: EngineSettings
    start: Start

    def name(self) -> str:
        """The training's: the same for the same plan in the same precision, so that processes started by hand agree
        on it, and `resume=latest` finds it with other devices, another strategy or another logging too.
        """
        if self.start.run is not None:
            return self.start.run
        both = {"plan": plan_hash(self.plan), "precision": self.settings.exec.precision}
        return f"{self.plan.name[:57]}-{digest(both, 'manyhands training v2')[:6]}"

    def packages(self) -> tuple[Package, ...]:
        """What must be installed beside manyhands' own requirements."""
        logging = self.settings.logging
        found = [*packages_of(self.plan)]
        if logging.tensorboard:
            found.append(Package(module="tensorboard", extra="tensorboard", option="logging.tensorboard"))
        if logging.wandb_project is not None:
            found.append(Package(module="wandb", extra="wandb", option="logging.wandb_project"))
        return tuple(found)

    def processes(self, devices: Sequence[int] | None, machines: int = 1) -> int:
        """How many each machine starts: as given, else one for each device, else as many as the parallelism needs,
        but this one alone where each is started by itself.

        Raises PlanError where as many are asked for as there are not devices.
        """
        asked, parallel = self.start.processes, self.settings.parallel
        if devices is not None:
            if asked not in (None, len(devices)):
                raise PlanError(
                    f"devices {','.join(map(str, devices))} are {len(devices)}, processes={asked}: "
                    "give one of the two"
                )
            return len(devices)
        if asked is not None or self.start.by_hand():
            return asked or 1
        return max(1, (parallel.data_parallelism or 1) * parallel.tensor_parallelism // machines)

    def as_yaml(self) -> str:
        """Plan and settings, every field written out."""
        return dump_plan(self.plan) + _yaml(self.settings)

    def as_files(self) -> dict[str, str]:
        """The texts that lie in a training's directory, by file name."""
        return {PLAN_FILE: dump_plan(self.plan), ENGINE_FILE: _yaml(self.settings)}

    def keep(self, directory: Path) -> None:
        """Write both files into the training's directory, in the place of those of an earlier start."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self.as_files().items():
            aside = directory / f".{name}.{os.getpid()}"
            aside.write_text(text, encoding="utf-8")
            aside.replace(directory / name)


def configure(
    overrides: Sequence[str] = (),
    *,
    config_name: str = "train",
    config_dir: Path | str | None = None,
    plan_file: Path | str | None = None,
    task: Mapping[str, Any] | None = None,
) -> Configuration:
    """The configuration of a named config, or of a plan file, with overrides on top. Raises PlanError.

    `task`: that of shards. Beneath a plan file's; in the place of a config's, of which only the model stays.
    """
    where = str(plan_file) if plan_file is not None else f"config '{config_name}'"
    where += " with overrides" if overrides else ""
    if plan_file is None and task is None:
        data = compose_data(overrides, config_name, config_dir)
        return _with_weights_found(_told_apart(data, where))
    data = compose_data((), config_name, config_dir) if plan_file is None else read_plan_file(plan_file)
    if task is not None:
        own = data.get("task", {})
        if plan_file is None:
            free = MODEL_SETTINGS.get(task["name"], frozenset()) if own.get("name") == task["name"] else ()
            own = {key: own[key] for key in free if key in own}
        data = {**data, "task": overlay(task, own)}
    return _with_weights_found(_told_apart(apply_overrides(data, overrides, config_dir), where))


def _with_weights_found(configuration: Configuration) -> Configuration:
    """Existing weights by a path that holds from anywhere: a checkpoint names it for good. Raises PlanError."""
    plan = configuration.plan
    weights = plan.task.weights if isinstance(plan.task, FineTuned) else None
    found = None if weights is None else weights_here(weights)
    if found is None:  # a name on the Hub, or what the task will not find either
        return configuration
    changes: dict[str, Any] = {"weights": str(found)}
    tokenizer = getattr(plan.task, "tokenizer", None)
    if tokenizer is not None and tokenizer.path == weights:
        changes["tokenizer"] = tokenizer.model_copy(update={"path": str(found)})
    task = plan.task.model_copy(update=changes)
    return replace(configuration, plan=plan.model_copy(update={"task": task}))


def kept_configuration(directory: Path, overrides: Sequence[str] = ()) -> Configuration:
    """That of a training, from its directory, with overrides on top. Shards that lie beside it, as those that were
    sent to a host, are found from anywhere. Raises PlanError.
    """
    data = read_plan_file(directory / PLAN_FILE)
    settings = data.get("data")
    shards = settings.get("shards") if isinstance(settings, dict) else None
    if isinstance(shards, str) and (beside := directory / shards).is_dir():
        data["data"]["shards"] = str(beside.resolve())
    if (directory / ENGINE_FILE).is_file():
        data |= read_plan_file(directory / ENGINE_FILE)
    if overrides:
        data = apply_overrides(data, overrides)
    return _told_apart(data, str(directory) + (" with overrides" if overrides else ""))


def _told_apart(data: dict[str, Any], where: str) -> Configuration:
    engine, start = _taken(data, EngineSettings), _taken(data, Start)
    known = {*Plan.model_fields, *EngineSettings.model_fields, *Start.model_fields}
    for key in data:
        if key not in known:
            raise PlanError(
                f"{where}: unknown key '{key}'.{_elsewhere(key, data) or did_you_mean(key, {*known, *_SHORT})}"
            )
    return Configuration(
        plan=resolve(data, where=where),
        settings=EngineSettings.parse(engine, where=where),
        start=Start.parse(start, where=where),
    )


_SHORT = ("optimizer", "model")
"""What composing puts elsewhere: local.optimizer and task.model."""


def _elsewhere(key: str, data: Mapping[str, Any]) -> str:
    """The settings that end in this name, as `steps`, of the task that `data` names; or nothing."""

    def paths(settings: Mapping[str, Any], before: str) -> Iterator[str]:
        for name, value in settings.items():
            if name == key:
                yield f"{before}{name}"
            elif isinstance(value, Mapping):
                yield from paths(value, f"{before}{name}.")

    task = data.get("task")
    named = {"task": {"name": task["name"]}} if isinstance(task, Mapping) and "name" in task else {}
    try:
        plan = resolve(named).model_dump()
    except PlanError:  # such a task needs more
        plan = resolve({}).model_dump(exclude={"task"})
    engine = EngineSettings.parse({}, where="defaults").model_dump()
    found = [f"'{path}'" for path in paths({**plan, **engine}, "")]
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _taken(data: dict[str, Any], kind: type[EngineSettings | Start]) -> dict[str, Any]:
    return {key: data.pop(key) for key in list(data) if key in kind.model_fields}


def _yaml(settings: EngineSettings) -> str:
    values: Mapping[str, Any] = settings.model_dump(mode="json")
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
