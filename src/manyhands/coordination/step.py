"""One event's working copy of a run's state. `tick` makes one per event; the rules write into it, and only there.

The state itself stays immutable: every `put` makes a new one. Nothing here decides anything.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from manyhands.coordination.effects import Body, Effect
from manyhands.coordination.state import Client, Entry, Round, RunState
from manyhands.coordination.types import AssignmentId, ClientId


class Step:
    """State, time and seed of one event, and the effects it has so far."""

    __slots__ = ("closed", "effects", "now_ms", "seed", "state")

    def __init__(self, state: RunState, now_ms: int, seed: int) -> None:
        self.state = state
        self.now_ms = now_ms
        self.seed = seed
        self.effects: list[Effect] = []
        self.closed: list[Round] = []

    def send(self, to: str, body: Body) -> None:
        self.effects.append(Effect(to=to, body=body))

    def change(self, **fields: Any) -> None:
        self.state = dataclasses.replace(self.state, **fields)

    def put_client(self, key: ClientId, **fields: Any) -> None:
        client = dataclasses.replace(self.state.clients[key], **fields)
        self.add_client(client)

    def add_client(self, client: Client) -> None:
        self.change(clients={**self.state.clients, client.key: client})

    def put_round(self, number: int, **fields: Any) -> None:
        self.add_round(dataclasses.replace(self.state.rounds[number], **fields))

    def add_round(self, round_: Round) -> None:
        self.change(rounds={**self.state.rounds, round_.number: round_})

    def put_entry(self, number: int, assignment: AssignmentId, **fields: Any) -> None:
        entries = self.state.rounds[number].entries
        self.add_entry(number, dataclasses.replace(entries[assignment], **fields))

    def add_entry(self, number: int, entry: Entry) -> None:
        entries = self.state.rounds[number].entries
        self.put_round(number, entries={**entries, entry.assignment.id: entry})
