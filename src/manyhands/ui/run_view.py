"""A run's account as text: what `server status` and `runs ls` print."""

from __future__ import annotations

from collections.abc import Sequence

import click

from manyhands.node.view import RunSummary, RunView, is_live
from manyhands.ui.terminal import (
    human_bytes,
    human_loss,
    human_rate,
    human_seconds,
    print_json,
    print_rows,
    printable,
    short_key,
    table,
)


def print_summaries(runs: Sequence[RunSummary], output: str) -> None:
    rows = [run.model_dump(mode="json") for run in runs]
    columns = {
        "run_id": "run",
        "phase": "phase",
        "closed_rounds": "round",
        "total_rounds": "of",
        "topology": "topology",
        "preset": "preset",
        "live_clients": "clients",
        "mean_loss": "loss",
    }
    print_rows(rows, columns, output)


def print_run(view: RunView, output: str) -> None:
    if output == "json":
        print_json(view.model_dump(mode="json"))
        return
    reason = f" ({printable(view.reason)})" if view.reason else ""
    click.echo(f"run {view.run_id}: {view.phase.replace('_', ' ')}{reason}")
    since = human_seconds((view.now_ms - view.started_ms) / 1000)
    click.echo(f"round {view.closed_rounds} of {view.total_rounds}, {since} since its start")
    if view.evaluations:
        first, last = view.evaluations[0], view.evaluations[-1]
        click.echo(
            f"validation loss {human_loss(first.loss)} at first, {human_loss(last.loss)} at round {last.round}"
        )
    if view.checkpoint:
        click.echo(f"checkpoint {printable(view.checkpoint)}")
    click.echo()
    click.echo(table(client_rows(view), CLIENT_COLUMNS))


CLIENT_COLUMNS = {
    "name": "client",
    "key": "key",
    "state": "state",
    "round": "round",
    "counted": "merged",
    "uncounted": "not",
    "loss": "loss",
    "rate": "per s",
    "up": "up",
    "down": "down",
}


def client_rows(view: RunView) -> list[dict[str, object]]:
    """One row for each client, in words and in the units that people read."""
    return [
        {
            "name": printable(client.label, width=24) or "unnamed",
            "key": short_key(client.key),
            "state": state_in_words(client.status, suspected=client.suspected),
            "round": client.round,
            "counted": client.counted,
            "uncounted": client.uncounted,
            "loss": human_loss(client.loss),
            "rate": human_rate(client.tokens_per_s if is_live(client) else None),
            "up": human_bytes(client.bytes_up),
            "down": human_bytes(client.bytes_down),
        }
        for client in view.clients
    ]


def state_in_words(status: str, *, suspected: bool) -> str:
    return "suspected" if suspected and status == "ready" else status.replace("_", " ")
