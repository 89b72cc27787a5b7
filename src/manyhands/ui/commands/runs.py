"""`manyhands runs ls`: the runs on this machine or on a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup, address_option, format_option
from manyhands.ui.commands.server import data_option

runs = LazyGroup(
    "runs",
    {"ls": Entry("manyhands.ui.commands.runs:ls", "List the runs on this machine, or on a server.")},
    help="The runs on this machine or on a server.",
)

_COLUMNS = {
    "run_id": "run",
    "part": "part",
    "phase": "phase",
    "latest_checkpoint": "latest checkpoint",
    "directory": "directory",
}


@click.command("ls", cls=Command)
@address_option(help="List a server's runs instead.")
@data_option
@format_option
def ls(server_addr: str | None, data_dir: Path | None, output: str) -> None:
    """List the runs on this machine: those served from here, taken part in, or trained here alone."""
    if server_addr is not None:
        from manyhands.node import operator
        from manyhands.ui.run_view import print_summaries

        summaries = operator.status(server_addr)
        assert isinstance(summaries, list)
        print_summaries(summaries, output)
        return
    from manyhands.ui.terminal import print_rows

    print_rows(_local(data_dir), _COLUMNS, output)


def _local(data_dir: Path | None) -> list[dict[str, Any]]:
    """A row for each directory of a run, and for each run in the database that has none."""
    from manyhands.config import home, runs_directory

    phases = _phases((data_dir or home() / "server") / "manyhands.db")
    root = runs_directory()
    rows = [_row(path, phases) for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
    known = {row["run_id"] for row in rows}
    rows += [
        {"run_id": run_id, "part": "server", "phase": phase, "latest_checkpoint": None, "directory": None}
        for run_id, phase in phases.items()
        if run_id not in known
    ]
    return rows


def _phases(database_file: Path) -> dict[str, str]:
    if not database_file.is_file():
        return {}
    from manyhands.storage.database import open_database
    from manyhands.storage.runs import list_runs

    database = open_database(database_file, create=False)
    try:
        return {run.run_id: run.phase for run in list_runs(database)}
    finally:
        database.close()


def _row(directory: Path, phases: dict[str, str]) -> dict[str, Any]:
    from manyhands.config.checkpoint_names import RUN, TRAINING, numbered

    parts = ["server"] if (directory / "server").is_dir() else []
    parts += ["client" for path in directory.iterdir() if re.fullmatch(r"[0-9a-f]{8}", path.name)][:1]
    parts += ["training"] if (directory / "events.jsonl").is_file() else []
    kept = numbered(directory / "checkpoints", TRAINING, RUN)
    return {
        "run_id": directory.name,
        "part": ", ".join(parts) or "unknown",
        "phase": phases.get(directory.name),
        "latest_checkpoint": kept[-1].name if kept else None,
        "directory": str(directory),
    }
