"""`manyhands config show`: a plan as it is after presets and overrides."""

from __future__ import annotations

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup
from manyhands.ui.commands.server import overrides_argument

config = LazyGroup(
    "config",
    {"show": Entry("manyhands.ui.commands.config:show", "Print the whole plan that a command line means.")},
    help="Look at plans.",
)


@click.command("show", cls=Command)
@overrides_argument
@click.option("--plan", metavar="PLAN", help="A plan file, or the name of a config.  [default: train]")
@click.option("--format", "output", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def show(overrides: tuple[str, ...], plan: str | None, output: str) -> None:
    """Print the whole plan that a command line means, every field written out: a plan file for later."""
    from manyhands.plan.resolve import dump_plan
    from manyhands.ui.plans import plan_from
    from manyhands.ui.terminal import print_json

    resolved = plan_from(plan, overrides)
    if output == "json":
        print_json(resolved.model_dump(mode="json"))
    else:
        click.echo(dump_plan(resolved), nl=False)
