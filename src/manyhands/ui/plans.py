"""Which plan a command line means: a file, or a config that comes with manyhands, with KEY=VALUE on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from manyhands.plan.schema import Plan

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration


CONFIGS: Final = {"chess_endgames": "endgames"}
"""By task: what lies below its shards, or below --pieces, where no config is named; else `train`."""

_RUN: Final = r"[a-z0-9-]{1,64}"


def plan_from(where: str | None, overrides: Sequence[str], config_name: str = "train") -> Plan:
    """The plan of file `where`, or of the config named `where`, else of `config_name`. Raises PlanError.

    Raises a usage error for an argument that is no KEY=VALUE.
    """
    check_overrides(overrides)
    if where is None:
        from manyhands.plan.compose import compose

        return compose(overrides, config_name)
    if re.fullmatch(r"[a-z0-9_-]+", where) and not Path(where).exists():
        from manyhands.plan.compose import compose

        return compose(overrides, where)
    from manyhands.plan.compose import load_plan

    return load_plan(where, overrides)


def configuration_from(
    plan: str | None,
    overrides: Sequence[str],
    config_name: str | None = None,
    config_dir: str | None = None,
    *,
    kept: Path | None = None,
    shards: str | None = None,
) -> Configuration:
    """That of a training: a plan file or a named config, with overrides on top.

    shards: a directory of them, whose task it is; contradictions are refused. kept: the directory of a training whose
    own configuration lies below them instead; so does that of one which `resume=DIR` names, where neither plan nor
    config is given.
    """
    from manyhands.engine.configuration import configure, kept_configuration
    from manyhands.plan.resolve import PLAN_FILE

    check_overrides(overrides)
    resume = next((unquoted(o.partition("=")[2]) for o in overrides if o.startswith("resume=")), "latest")
    if resume not in ("", "latest"):
        resume = str(run_at(resume))
        overrides = [o for o in overrides if not o.startswith("resume=")] + [f"resume={quoted(resume)}"]
        if kept is None and not (plan or config_name):
            kept = training_of(resume)
    if kept is not None and (kept / PLAN_FILE).is_file():
        return kept_configuration(kept, overrides)
    task = None if shards is None else task_of(shards)
    usual = CONFIGS.get("" if task is None else task["name"], "train")
    configuration = configure(
        overrides, config_name=config_name or usual, config_dir=config_dir, plan_file=plan, task=task
    )
    if shards is not None:
        from manyhands.data.shards.manifest import check_task, read_manifest

        check_task(read_manifest(Path(shards)), configuration.plan, Path(shards))
    return configuration


def task_of(shards: str) -> dict[str, Any]:
    """The settings of the task that shards were made of. Raises DataError."""
    from manyhands.data.shards.manifest import read_manifest

    return dict(read_manifest(Path(shards)).task)


def check_pieces(pieces: str | None, shards: str) -> None:
    """Raises a usage error where shards are of other chess pieces than was said, or of no chess at all."""
    task = task_of(shards)
    found = task.get("pieces")
    if pieces is not None and (found is None or not same_pieces(pieces, found)):
        what = f"the task {task['name']}" if found is None else f"the pieces {found}"
        raise click.UsageError(
            f"--pieces {pieces} contradicts the shards in {shards}, which are of {what}: leave it out, or give others"
        )


def same_pieces(one: str, other: str) -> bool:
    """Whether two specifications say the same, such as KPkr and KRkp. Raises DataError for one that is impossible."""
    from manyhands.tasks.chess_endgames.pieces import parse

    return parse(one).text == parse(other).text


def quoted(text: str) -> str:
    """As a value of an override, whatever is in it: backslashes count only before a quote (hydra's grammar)."""

    def escaped(found: re.Match[str]) -> str:
        return found[1] * 2 + ("\\'" if found[2] else "")

    return "'" + re.sub(r"(\\*)('|\Z)", escaped, text) + "'"


def unquoted(value: str) -> str:
    """The text of which `quoted` made this; a value that nobody has quoted stays."""
    if not (len(value) >= 2 and value[0] == value[-1] == "'"):
        return value
    return re.sub(r"(\\+)('|\Z)", lambda found: found[1][: len(found[1]) // 2] + found[2], value[1:-1])


def configuration_of(
    where: str | None, overrides: Sequence[str], config_dir: str | None = None
) -> Configuration:
    """As `plan_from`: of file `where`, or of the config so named, with the engine's settings beside the plan."""
    named = where is not None and re.fullmatch(r"[a-z0-9_-]+", where) and not Path(where).exists()
    plan_file, config_name = (None, where) if where is None or named else (where, None)
    return configuration_from(plan_file, overrides, config_name, config_dir)


def check_overrides(overrides: Sequence[str]) -> None:
    """Raises a usage error for an argument that is no KEY=VALUE."""
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals and not key.startswith("~"):
            raise click.UsageError(f"'{text}' is not KEY=VALUE, as in local.steps=50")


def run_at(where: str) -> Path:
    """The path, or where there is none the directory in runs/ of the run so named."""
    from manyhands.config import runs_directory

    path = Path(where).expanduser()
    by_name = runs_directory() / where
    return by_name if not path.exists() and re.fullmatch(_RUN, where) and by_name.is_dir() else path


def no_run_at(where: str) -> str:
    """What is said of a path or name that is nothing here."""
    from manyhands.config import run_like, runs_directory

    return f"there is no directory {where!r}, and no run of that name in {runs_directory()}.{run_like(where)}"


def training_of(resume: str) -> Path | None:
    """The directory of the training that a path names, or that holds the checkpoint which it names."""
    path = Path(resume).expanduser().resolve()
    return next((place for place in (path, *path.parents) if (place / "events.jsonl").is_file()), None)


def training_directory(configuration: Configuration, directory: Path | None) -> Path:
    """The directory of a training: the given one; of one that goes on, its own unless it is given another name by
    `run`; else one in runs/ by its name.

    Processes that are started each by itself, and a resume, find it by the configuration; else the name is new.
    """
    from manyhands.config import runs_directory
    from manyhands.plan.resolve import new_run_id

    start = configuration.start
    if directory is not None:
        return directory
    if start.resume not in (None, "latest"):
        if not Path(start.resume).expanduser().exists():
            raise click.UsageError(f"--resume: {no_run_at(start.resume)}")
        found = training_of(start.resume)
        if found is not None and not start.run:
            return found
    if start.resume == "latest" and not start.run and not start.by_hand():
        return _latest_of(configuration) or runs_directory() / configuration.name()
    agreed = start.run or start.resume is not None or start.by_hand()
    return runs_directory() / (configuration.name() if agreed else new_run_id(configuration.plan))


def _latest_of(configuration: Configuration) -> Path | None:
    """The directory in runs/, under any name, with the newest checkpoint of this plan in this precision."""
    from manyhands.config import runs_directory
    from manyhands.config.checkpoint_names import TRAINING, numbered
    from manyhands.engine.configuration import kept_configuration
    from manyhands.errors import PlanError
    from manyhands.plan.resolve import PLAN_FILE

    wanted, found = configuration.name(), list[tuple[float, Path]]()
    for run in runs_directory().glob("*"):
        saved = numbered(run / "checkpoints", TRAINING)
        if not saved or not (run / PLAN_FILE).is_file():
            continue
        try:
            same = kept_configuration(run).name() == wanted
        except PlanError:  # of an older version, or broken: not this one
            continue
        if same:
            found.append((saved[-1].stat().st_mtime, run))
    return max(found)[1] if found else None
