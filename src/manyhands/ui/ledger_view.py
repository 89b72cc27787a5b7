"""The ledger as text: who was assigned, contributed, was merged or not and why, for each round.

Reads the rounds in their JSON form (coordination/ledger.py RoundAccount), from a server or from its database, so
that both look alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from manyhands.node.view import RunView
from manyhands.ui.logs import clock
from manyhands.ui.terminal import (
    human_bytes,
    human_loss,
    human_seconds,
    print_json,
    printable,
    short_key,
    table,
)

_COLUMNS = {
    "round": "round",
    "client": "client",
    "assigned": "assigned",
    "outcome": "outcome",
    "weight": "weight",
    "loss": "loss",
    "sent": "sent",
    "took": "took",
}
_INCIDENTS = {"at": "at", "round": "round", "client": "client", "what": "what", "detail": "detail"}


def print_ledger(
    rounds: Sequence[Mapping[str, Any]],
    incidents: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    output: str,
) -> None:
    """`incidents`: {ms, round, client, what, detail}; `labels`: a name for each key."""
    if output == "json":
        print_json({"rounds": list(rounds), "incidents": list(incidents)})
        return
    click.echo(table(ledger_rows(rounds, labels), _COLUMNS))
    if incidents:
        click.echo("\nWhat happened")
        rows = [
            {
                "at": clock(incident["ms"]),
                "round": incident["round"],
                "client": _name(incident["client"], labels),
                "what": incident["what"],
                "detail": incident.get("detail", ""),
            }
            for incident in incidents
        ]
        click.echo(table(rows, _INCIDENTS))


def print_account_of(key: str, rounds: Sequence[Mapping[str, Any]], view: RunView) -> None:
    """What happened to one client: its incidents, and its work from the round before the first of them that is not
    its joining."""
    mine = [i for i in view.incidents if i.client == key]
    for incident in mine:
        click.echo(f"  {clock(incident.ms)}  round {incident.round}: {printable(incident.text)}")
    gone = [i.round for i in mine if i.round is not None and i.what != "joined"]
    first = max(0, min(gone) - 1) if gone else 0
    works = [
        {**closed, "works": [w for w in closed["works"] if w["assignment"]["client"] == key]}
        for closed in rounds
        if closed["number"] >= first
    ]
    rows = ledger_rows([closed for closed in works if closed["works"]], {})
    text = table(rows, {name: heading for name, heading in _COLUMNS.items() if name != "client"})
    click.echo("\n".join("  " + line for line in text.splitlines()))


def ledger_rows(rounds: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """One row for each piece of work; a round in which nobody had any has one row that says so."""
    rows: list[dict[str, Any]] = []
    for closed in rounds:
        works = sorted(closed["works"], key=lambda w: (w["position"] is None, w["position"]))
        for work in works:
            rows.append(_row(closed["number"], work, labels))
        if not works:
            rows.append({"round": closed["number"], "client": "-", "outcome": "nobody had work"})
    return rows


def _row(number: int, work: Mapping[str, Any], labels: Mapping[str, str]) -> dict[str, Any]:
    assignment, contribution = work["assignment"], work["contribution"] or {}
    claims, update = contribution.get("claims") or {}, contribution.get("update") or {}
    sent = work["opened_ms"]
    merged = "merged" if work["factor"] in (None, 1.0) else f"merged, clipped by {work['factor']:.3g}"
    return {
        "round": number,
        "client": _name(assignment["client"], labels),
        "assigned": f"{assignment['steps']} x {assignment['batch_size']}",
        "outcome": merged if work["counted"] else f"not merged: {work['reason'] or 'no reason given'}",
        "weight": assignment["weight"],
        "loss": human_loss(claims.get("loss")),
        "sent": human_bytes(update["size_bytes"]) if update else "-",
        "took": "-" if sent is None else human_seconds((sent - work["assigned_ms"]) / 1000),
    }


def _name(key: str, labels: Mapping[str, str]) -> str:
    label = labels.get(key, "")
    return f"{label} {short_key(key)}" if label else short_key(key)
