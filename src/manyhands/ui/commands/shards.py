"""`manyhands shards ...`: data made ahead; making them is in shards_making.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup, format_option

if TYPE_CHECKING:
    from manyhands.data.shards.manifest import Manifest

_HERE, _MAKING = "manyhands.ui.commands.shards", "manyhands.ui.commands.shards_making"

shards = LazyGroup(
    "shards",
    {
        "gen-endgames": Entry(f"{_MAKING}:gen_endgames", "Make chess endgames with their exact truth."),
        "pack": Entry(f"{_MAKING}:pack", "Make shards of any task's data."),
        "import": Entry(f"{_MAKING}:import_tpg", "Make shards of TPG files that exist."),
        "info": Entry(f"{_HERE}:info", "Show what is in shards, and how they were made."),
        "verify": Entry(f"{_HERE}:verify", "Read every byte of shards and name what is broken."),
        "merge": Entry(f"{_HERE}:merge", "Make one directory of shards of several."),
    },
    help="Data made ahead, as Parquet files with a manifest. `manyhands train --shards DIR` trains on them.",
)

directory_argument = click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
out_option = click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="A new directory for the shards.",
)

_SETS = {"set": "set", "rows": "rows", "files": "files", "size": "size", "bytes_per_row": "bytes/row"}
_COLUMNS = {"set": "set", "column": "column", "dtype": "dtype", "shape": "shape"}
_FAULTS = {"file": "file", "group": "row group", "what": "what"}


@click.command("info", cls=Command)
@directory_argument
@format_option
def info(directory: Path, output: str) -> None:
    """What is in the shards of DIR: the task, rows and columns of each set, and how they were made."""
    from manyhands.data.shards.manifest import read_manifest
    from manyhands.ui.terminal import print_json

    manifest = read_manifest(directory)
    if output == "json":
        print_json(_as_json(manifest))
        return
    _print_info(manifest)


def _as_json(manifest: Manifest) -> dict[str, Any]:
    """All of the manifest but the row groups."""
    values = manifest.model_dump(mode="json")
    for part in values["sets"].values():
        part["rows"] = sum(file["rows"] for file in part["files"])
        for file in part["files"]:
            file["groups"] = len(file["groups"])
    return values


def _print_info(manifest: Manifest) -> None:
    from manyhands.plan.tasks import MODEL_SETTINGS
    from manyhands.ui.terminal import human_bytes, printable, table

    free = MODEL_SETTINGS.get(manifest.task["name"], frozenset())
    for key, value in manifest.task.items():
        if key not in free:
            click.echo(f"{key}: {printable(str(value))}")
    rows, columns = [], []
    for name, part in manifest.sets.items():
        size = sum(file.size_bytes for file in part.files)
        rows.append({"set": name, "rows": f"{part.rows:,}", "files": len(part.files), "size": human_bytes(size),
                     "bytes_per_row": size / part.rows})  # fmt: skip
        for column in part.columns:
            shape = " x ".join(map(str, column.shape)) or "1"
            columns.append({"set": name, "column": column.name, "dtype": column.dtype, "shape": shape})
    click.echo("\n".join(["", table(rows, _SETS), "", table(columns, _COLUMNS), ""]))
    for made in manifest.made:
        click.echo(
            f"made {made.time} by manyhands {made.manyhands}, seed {made.seed}, {made.rows:,} rows: "
            f"{printable(made.command)}"
        )


@click.command("verify", cls=Command)
@directory_argument
@format_option
def verify(directory: Path, output: str) -> None:
    """Compare every byte of the shards in DIR with the manifest's hashes; exit code 4 where something is broken."""
    from manyhands.data.shards.verify import verify as compare
    from manyhands.errors import DataError
    from manyhands.ui.shard_progress import bytes_read
    from manyhands.ui.terminal import print_rows

    with bytes_read() as tell:
        faults = compare(directory, on_progress=tell)
    rows = [{"file": fault.file, "group": fault.group, "what": fault.what} for fault in faults]
    if output == "json" or rows:
        print_rows(rows, _FAULTS, output)
    if faults:
        files = len({fault.file for fault in faults})
        raise DataError(
            f"{files} file{'s' * (files > 1)} of {directory} {'are' if files > 1 else 'is'} broken: put good ones in "
            "their place, make the shards again, or train without them: data.on_broken=skip"
        )
    if output == "table":
        click.echo(f"{directory}: every byte is as it was written")


@click.command("merge", cls=Command)
@click.argument("sources", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@out_option
def merge(sources: tuple[Path, ...], out: Path) -> None:
    """Make one directory of shards of several of the same kind: files are linked where that is possible.

    Their rows must be others: made with other seeds, or of other sources.
    """
    from manyhands.data.shards.merge import merge as join
    from manyhands.ui.shard_progress import bytes_read

    with bytes_read() as tell:
        manifest = join(sources, out, on_progress=tell)
    click.echo(summary(manifest, out))


def summary(manifest: Manifest, directory: Path) -> str:
    """One line: what there is, and how to train on it."""
    rows = ", ".join(f"{part.rows:,} rows of {name}" for name, part in manifest.sets.items())
    files = sum(len(part.files) for part in manifest.sets.values())
    return f"{rows} in {files} files: manyhands train --shards {directory}"
