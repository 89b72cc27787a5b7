"""`manyhands ledger RUN`: what happened in each round, to whom, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from manyhands.ui.command_line import Command, address_option, format_option
from manyhands.ui.commands.server import data_option


@click.command("ledger", cls=Command)
@click.argument("run_id", metavar="RUN")
@data_option
@address_option(help="Ask a server, instead of reading a database here.")
@format_option
def ledger(run_id: str, data_dir: Path | None, server_addr: str | None, output: str) -> None:
    """Who was assigned, contributed, was merged or not and why, for each round of a run.

    Reads the server's database on this machine, whether the server runs or not, or asks a server.
    """
    from manyhands.ui.ledger_view import print_ledger

    if server_addr is not None and data_dir is not None:
        raise click.UsageError("--server-addr and --data-dir contradict each other: give one")
    found = _stored(run_id, data_dir) if server_addr is None else _asked(server_addr, run_id)
    print_ledger(*found, output)


Found = tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]


def _asked(address: str, run_id: str) -> Found:
    from manyhands.node import operator
    from manyhands.node.view import RunView

    view = operator.status(address, run_id)
    assert isinstance(view, RunView)
    incidents = [incident.model_dump(mode="json") for incident in view.incidents]
    return operator.ledger(address, run_id), incidents, {client.key: client.label for client in view.clients}


def _stored(run_id: str, data_dir: Path | None) -> Found:
    from pydantic import TypeAdapter

    from manyhands.config import home
    from manyhands.coordination.ledger import RoundAccount, account
    from manyhands.coordination.machine import initial_state
    from manyhands.coordination.types import BlobRef, Snapshot
    from manyhands.plan.descriptor import RunDescriptor
    from manyhands.storage.database import open_database
    from manyhands.storage.events import RunLog
    from manyhands.storage.runs import get_run

    database = open_database((data_dir or home() / "server") / "manyhands.db", create=False)
    try:
        descriptor = RunDescriptor.model_validate_json(get_run(database, run_id).descriptor)
        blob = descriptor.first_snapshot
        first = Snapshot(
            round=0,
            blob=BlobRef(blob=blob.blob, size_bytes=blob.size_bytes),
            fingerprint=descriptor.first_fingerprint,
        )
        initial = initial_state(run_id, descriptor.plan, descriptor.samples, first)
        told = account(initial, RunLog(database, run_id).all_records())
    finally:
        database.close()
    rounds = TypeAdapter(tuple[RoundAccount, ...]).dump_python(told.rounds, mode="json")
    incidents = [
        {"ms": i.at_ms, "round": i.round, "client": i.client, "what": i.kind, "detail": i.detail}
        for i in told.incidents
    ]
    return list(rounds), incidents, {key: client.label for key, client in told.state.clients.items()}
