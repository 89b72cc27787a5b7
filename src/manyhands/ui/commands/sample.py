"""`manyhands sample CHECKPOINT`: text from a trained language model."""

from __future__ import annotations

import sys

import click

from manyhands.ui.command_line import Command


@click.command("sample", cls=Command)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--prompt", metavar="TEXT", default="", help="What the text begins with.  [default: nothing]")
@click.option("--tokens", metavar="N", type=click.IntRange(min=1), default=200, show_default=True)
@click.option(
    "--temperature",
    metavar="T",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="0: always the likeliest token.",
)
@click.option(
    "--top-k",
    metavar="K",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="Choose among the K likeliest; 0: among all.",
)
@click.option("--seed", metavar="S", type=click.IntRange(min=0), default=1337, show_default=True)
def sample(checkpoint: str, prompt: str, tokens: int, temperature: float, top_k: int, seed: int) -> None:
    """Print a prompt and what a trained language model writes behind it.

    CHECKPOINT is a checkpoint's directory, that of a training or of a run (then its newest), or a run's name. The
    same seed gives the same text on the same machine.
    """
    from manyhands.ui.checkpoints import locate

    found = locate(checkpoint)
    from manyhands.tasks.sample import sample_text

    text = sample_text(found, prompt=prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed)
    click.echo(_harmless(text) if sys.stdout.isatty() else text)


def _harmless(text: str) -> str:
    """A model may write anything, also what steers a terminal."""
    from manyhands.ui.terminal import printable

    return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))
