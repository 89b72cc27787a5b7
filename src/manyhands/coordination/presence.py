"""Who is there: the few words in which all rules speak of clients.

live: has joined and is neither gone nor lost. present: live, and heard lately (not suspected).
ready: has loaded public once since it joined. in step: its public has seen every closing.
"""

from __future__ import annotations

from manyhands.coordination.state import Client, RunState
from manyhands.coordination.types import ClientId


def is_live(client: Client | None) -> bool:
    return client is not None and client.status in ("catching_up", "ready")


def is_present(client: Client | None) -> bool:
    return client is not None and client.status in ("catching_up", "ready") and not client.suspected


def is_in_step(client: Client, state: RunState) -> bool:
    """Can be given work for the next closing."""
    return client.status == "ready" and not client.suspected and client.round == state.closed_rounds


def live_clients(state: RunState) -> list[Client]:
    return [client for client in state.clients.values() if is_live(client)]


def present_clients(state: RunState) -> list[Client]:
    return [client for client in state.clients.values() if is_present(client)]


def in_step_clients(state: RunState) -> list[Client]:
    """Sorted by key, so that nothing depends on the order of joining."""
    return sorted((c for c in state.clients.values() if is_in_step(c, state)), key=lambda c: c.key)


def clients_needed(state: RunState) -> int:
    return max(1, state.plan.membership.min_clients)


def by_reliability(clients: list[Client]) -> list[ClientId]:
    """Most counted contributions first; the key decides between equals."""
    return [client.key for client in sorted(clients, key=lambda c: (-c.counted, c.key))]
