"""`manyhands bench GROUP`: measure manyhands on this machine beside its targets."""

from __future__ import annotations

import click

from manyhands.ui.command_line import Command, format_option

GROUPS = ("core", "engine", "swarm", "hosts")

_COLUMNS = {
    "name": "name",
    "value": "value",
    "unit": "unit",
    "target": "target",
    "floor": "floor",
    "met": "met",
}


@click.command("bench", cls=Command)
@click.argument("group", type=click.Choice(GROUPS))
@click.option("--only", multiple=True, metavar="NAME", help="Only this measurement of the group.")
@format_option
def bench(group: str, only: tuple[str, ...], output: str) -> None:
    """Measure a group: core, engine, swarm or hosts. Each measurement runs in a process of its own.

    `floor` is what the machine itself can do, measured in the same run; `met` compares value and target.
    """
    from manyhands.errors import WorkerError
    from manyhands.ui.bench.harness import run_one
    from manyhands.ui.bench.registry import GROUPS as registered
    from manyhands.ui.terminal import print_rows

    chosen = [m for m in registered[group] if not only or m.name in only]
    unknown = set(only) - {m.name for m in registered[group]}
    if unknown:
        known = ", ".join(m.name for m in registered[group]) or "none yet"
        raise click.UsageError(f"group {group} has no '{sorted(unknown)[0]}'; it has: {known}")
    if not chosen:
        click.echo(f"group {group} has no measurements yet", err=True)
    rows, failed = [], []
    for measurement in chosen:
        click.echo(f"measuring {measurement.name}: {measurement.what}", err=True)
        try:
            rows.append(run_one(measurement))
        except WorkerError as error:  # what was measured before and after is shown all the same
            click.echo(str(error), err=True)
            failed.append(measurement.name)
    print_rows(rows, _COLUMNS, output)
    if output == "table":
        click.echo("\n".join(["", *(f"{row['name']}: {row['note']}." for row in rows if row["note"])]))
    if failed:
        raise WorkerError(f"{len(failed)} of {len(chosen)} measurements failed: {', '.join(failed)}")
