"""`manyhands demo`: a server, three clients and a dashboard on this machine."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from manyhands.ui.command_line import Command

if TYPE_CHECKING:
    from manyhands.ui.demo import Demo, DemoResult


@click.command("demo", cls=Command)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--clients",
    metavar="N",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="How many clients.",
)
@click.option(
    "--rounds",
    metavar="N",
    type=click.IntRange(min=3),
    default=16,
    show_default=True,
    help="How many rounds.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path, exists=True),
    help="Train on this file or directory of text.  [default: the source of Python's standard library]",
)
@click.option(
    "--topology",
    type=click.Choice(["star", "mesh"]),
    default="star",
    show_default=True,
    help="Who merges: the server's aggregator, or every client.",
)
@click.option(
    "--port",
    metavar="N",
    type=click.IntRange(0, 65535),
    default=0,
    help="The server's port.  [default: a free one]",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="Where everything goes.  [default: runs/<run id> in MANYHANDS_HOME]",
)
@click.option("--keep", is_flag=True, help="Leave server and dashboard running until Ctrl-C.")
@click.option(
    "--logs",
    type=click.Choice(["tui", "console", "none"]),
    help="What to show.  [default: tui on a terminal, else console]",
)
def demo(
    overrides: tuple[str, ...],
    clients: int,
    rounds: int,
    text: Path | None,
    topology: Literal["star", "mesh"],
    port: int,
    directory: Path | None,
    keep: bool,
    logs: str | None,
) -> None:
    """A server, three clients and a dashboard on this machine train a small GPT on real text.

    One client is killed on the way and comes back. Ends with the losses, the ledger's account of that client, a
    picture of the loss curve, a checkpoint that transformers loads, and a sample of its text.
    """
    from manyhands.ui.demo import Demo, DemoOptions
    from manyhands.ui.live import RunScreen, choose_logs

    options = DemoOptions(
        clients=clients,
        rounds=rounds,
        text=text,
        topology=topology,
        port=port,
        directory=directory,
        overrides=overrides,
    )
    with RunScreen(choose_logs(logs)) as screen:
        run = Demo(options, screen)
        with run:
            result = run.run()
            summary = run.write_summary(result)
            screen.close()
            _report(run, result, keep)
            if keep:
                click.echo(f"\nThe dashboard stays at http://{result.address}/ until Ctrl-C.")
            click.echo(str(summary))
            if keep:
                _wait_for_interrupt()


def _wait_for_interrupt() -> None:
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        click.echo("ending server and clients", err=True)


def _report(run: Demo, result: DemoResult, keep: bool) -> None:
    from manyhands.ui.ledger_view import print_account_of
    from manyhands.ui.terminal import human_bytes, human_seconds, printable

    evaluations = [e.loss for e in result.view.evaluations if e.loss is not None]
    click.echo()
    if len(evaluations) > 1:
        before, after = evaluations[0], evaluations[-1]
        click.echo(f"Validation loss {before:.4f} -> {after:.4f}: {after / before:.2f} of what it was")
    took = (
        f"{human_seconds(result.seconds)}, peak memory of all processes {human_bytes(run.memory.peak_bytes)}"
    )
    click.echo(f"{result.view.closed_rounds} rounds, {run.options.clients} clients, {took}")
    killed = result.killed
    click.echo(f"\nThe ledger's account of {killed.name}, killed in round {killed.at_round}:")
    print_account_of(killed.key, result.account, result.view)
    click.echo("\nA sample of its text, after 'def ':")
    click.echo("\n".join("  | " + printable(line.expandtabs(4)) for line in result.sample.splitlines()))
    click.echo(f"\nLoss curve  {result.plot}")
    click.echo(f"Checkpoint  {result.checkpoint}")
    ended = "" if keep else "  (ends with the demo; --keep leaves it running)"
    click.echo(f"Dashboard   http://{result.address}/runs/{run.run_id}{ended}")
    click.echo(f"Ledger      manyhands ledger {run.run_id} --data-dir {run.directory / 'server' / 'server'}")
