"""`manyhands init [DIR]`: a plan and a task file for data or a model of one's own."""

from __future__ import annotations

from pathlib import Path

import click

from manyhands.ui.command_line import Command

FILES = ("my_task.py", "plan.yaml")


@click.command("init", cls=Command)
@click.argument("directory", metavar="[DIR]", type=click.Path(path_type=Path, file_okay=False), default=".")
def init(directory: Path) -> None:
    """Write plan.yaml and my_task.py into DIR (default: here), to be changed to data or a model of one's own.

    They run as they are. Python looks for my_task in the working directory too, so train from within DIR. What is
    there already is never overwritten.
    """
    from importlib.resources import files

    there = [name for name in FILES if (directory / name).exists()]
    if there:
        raise click.UsageError(f"{directory / there[0]} exists already: choose another DIR, or remove it")
    template = files("manyhands") / "tasks" / "template"
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (directory / name).write_bytes((template / name).read_bytes())
        click.echo(f"wrote {directory / name}")
    click.echo("\nTrain it as it is, then change my_task.py:\n")
    if directory.resolve() != Path.cwd():
        click.echo(f"    cd {directory}")
    click.echo("    manyhands train --plan plan.yaml --allow-task my_task:FAMILY")
