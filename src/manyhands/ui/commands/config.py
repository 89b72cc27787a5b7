"""`manyhands config show|copy`: a configuration as it is after presets and overrides, and the configs themselves."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup
from manyhands.ui.commands.server import overrides_argument

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration

_HERE = "manyhands.ui.commands.config"

config = LazyGroup(
    "config",
    {
        "show": Entry(f"{_HERE}:show", "Print the plan and the engine's settings that a command line means."),
        "copy": Entry(f"{_HERE}:copy", "Copy the configs of manyhands, to edit them and use --config-dir."),
    },
    help="Look at configurations, and make your own.",
)


@click.command("show", cls=Command)
@overrides_argument
@click.option("--plan", metavar="PLAN", help="A plan file, or the name of a config.  [default: train]")
@click.option("--config-dir", metavar="DIR", help="Configs of your own, before those of manyhands.")
@click.option(
    "--only", type=click.Choice(["plan", "engine"]), help="plan: what a server takes.  [default: both]"
)
@click.option(
    "--format",
    "output",
    type=click.Choice(["yaml", "json", "table"]),
    default="yaml",
    show_default=True,
    help="table: each setting with its value, default and meaning.",
)
def show(
    overrides: tuple[str, ...], plan: str | None, config_dir: str | None, only: str | None, output: str
) -> None:
    """Print all that a command line of `train` means, every field written out: a file for `train --plan`.

    The plan is what is computed; parallel, exec, logging and checkpoints are the engine's and say with what. Groups
    choose several at once: task, model, data, optimizer, schedule, evaluation, parallel, logging, outer, codec, as in
    parallel=fsdp schedule=cosine.
    """
    import yaml

    from manyhands.plan.resolve import dump_plan
    from manyhands.ui.plans import configuration_of
    from manyhands.ui.terminal import print_json

    configuration = configuration_of(plan, overrides, config_dir)
    if started := configuration.start.model_dump(exclude_defaults=True):
        raise click.UsageError(
            f"{min(started)} says how a training is started and is not part of it: leave it out"
        )
    if output == "table":
        for line in _explained(configuration, only):
            click.echo(line)
        return
    engine = configuration.settings.model_dump(mode="json") if only != "plan" else {}
    if output == "json":
        print_json((configuration.plan.model_dump(mode="json") if only != "engine" else {}) | engine)
        return
    click.echo(dump_plan(configuration.plan) if only != "engine" else "", nl=False)
    click.echo(yaml.safe_dump(engine, sort_keys=False, allow_unicode=True) if engine else "", nl=False)


def _explained(configuration: Configuration, only: str | None) -> list[str]:
    """Every setting in words."""
    from manyhands.engine.explain import describe as describe_engine
    from manyhands.plan.explain import describe, lines_of

    settings = describe(configuration.plan) if only != "engine" else []
    settings += describe_engine(configuration.settings) if only != "plan" else []
    return lines_of(settings, click.get_current_context().max_content_width or 110)


@click.command("copy", cls=Command)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
def copy(directory: Path) -> None:
    """Copy all configs into DIR, which must be new or empty. Edit them, add your own, and use --config-dir DIR.

    A config or an option of a group in DIR comes before that of manyhands; what DIR does not have is still found.
    """
    from importlib.resources import as_file, files

    if directory.exists() and any(directory.iterdir()):
        raise click.UsageError(f"{directory} is not empty: choose a new directory")
    with as_file(files("manyhands") / "conf") as tree:
        shutil.copytree(tree, directory, dirs_exist_ok=True)
    count = sum(1 for _ in directory.rglob("*.yaml"))
    click.echo(f"{count} configs in {directory}: manyhands train --config-dir {directory} ...")
