"""`manyhands client ...`: identities, and taking part in a run."""

from __future__ import annotations

from pathlib import Path

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup

_HERE = "manyhands.ui.commands.client"

client = LazyGroup(
    "client",
    {
        "train": Entry(
            "manyhands.ui.commands.client_train:train", "Take part in a run until it is finished."
        ),
        "new-identity": Entry(f"{_HERE}:new_identity", "Make a key file and print its public key."),
        "show-identity": Entry(f"{_HERE}:show_identity", "Print the public key of a key file."),
    },
    help="Take part in a run; make and show identities.",
)

_key_path = click.option(
    "--identity-secret-key-path",
    "path",
    required=True,
    type=click.Path(path_type=Path),
    help="The key file: 32 bytes, the seed of an Ed25519 key, readable by its owner alone.",
)


@click.command("new-identity", cls=Command)
@_key_path
def new_identity(path: Path) -> None:
    """Make a new key file and print its public key: your name in every run. An existing file is never touched."""
    from manyhands.identity import keys

    click.echo(keys.create(path).public)


@click.command("show-identity", cls=Command)
@_key_path
def show_identity(path: Path) -> None:
    """Print the public key of a key file; the secret is never printed."""
    from manyhands.identity import keys

    click.echo(keys.load(path).public)
