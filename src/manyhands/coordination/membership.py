"""Who takes part: joining, being ready, being suspected, going, and coming back.

One session per key: a process is named by its boot id, and a new one takes over only when the old one is gone or
suspected, which the server says as soon as its connection closes. Until then the newcomer is refused.
"""

from __future__ import annotations

from manyhands.coordination.effects import CatchUp, Dismissed
from manyhands.coordination.events import Joined, Left, Ready, Recovered, Suspected
from manyhands.coordination.fingerprints import compare_reports
from manyhands.coordination.newcomers import catch_up
from manyhands.coordination.presence import is_live, is_present, live_clients
from manyhands.coordination.rounds import SERVER, release_work, session_ended
from manyhands.coordination.situations import situation
from manyhands.coordination.state import Client, RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, EVERYONE, ClientId


def may_join(state: RunState, client: ClientId, boot: str) -> str | None:
    """Why this process may not join now, or None when it may. Asked at the door, before `Joined` is recorded."""
    membership = state.plan.membership
    known = state.clients.get(client)
    if client in (AGGREGATOR, EVALUATOR, EVERYONE, SERVER):
        return f"'{client}' is no client's key"
    if known is not None and known.status == "kicked":
        return "the operator has removed this client from the run"
    if membership.kind == "allow_list" and client not in membership.allow:
        return f"the key {client} is not on the run's allow-list; ask the organizer to add it"
    if state.phase == "finished":
        return f"run {state.run_id} is finished"
    if state.phase == "failed":
        return f"run {state.run_id} has failed: {state.reason}"
    if known is not None and is_present(known) and known.boot != boot:
        return "another process takes part with this key; stop it, or use a key of its own for each client"
    if not is_live(known) and len(live_clients(state)) >= membership.max_clients:
        return f"the run is full: {membership.max_clients} clients take part (membership.max_clients)"
    return None


def joined(step: Step, event: Joined) -> None:
    """A session begins, or one asks to be told again where to start from.

    Another boot than before: what the old process had not sent is free again. The same boot: its work stays its
    work, and it is told everything again; it is out of step only when it does not hold what it held.
    """
    key = event.client
    known = step.state.clients.get(key)
    if may_join(step.state, key, event.boot) is not None:
        if known is not None and known.status == "kicked":
            step.send(key, session_ended(known))
        return
    if known is not None and is_live(known) and known.boot == event.boot:
        step.put_client(key, suspected=False, label=event.label or known.label)
        if known.status == "ready" and event.has_round == known.round:
            for body in situation(step.state, key):
                step.send(key, body)
            return
        step.put_client(key, status="catching_up", round=None)
    elif known is not None:
        release_work(step, key, "its client started again")
        step.put_client(
            key,
            boot=event.boot,
            label=event.label or known.label,
            status="catching_up",
            suspected=False,
            round=None,
            joined_ms=step.now_ms,
            rejoined=known.rejoined + 1,
        )
    else:
        step.add_client(
            Client(key=key, boot=event.boot, label=event.label, status="catching_up", joined_ms=step.now_ms)
        )
    step.send(key, catch_up(step.state, event.has_round))
    for body in situation(step.state, key):
        if not isinstance(body, CatchUp):
            step.send(key, body)


def ready(step: Step, event: Ready) -> None:
    """It holds public after `event.round` closings; what it said before is not taken back by an older one."""
    client = _speaker(step, event.client)
    if client is None or not 0 <= event.round <= step.state.closed_rounds:
        return
    furthest = event.round if client.round is None else max(client.round, event.round)
    if client.status != "ready" or client.round != furthest:
        step.put_client(client.key, status="ready", round=furthest)
        compare_reports(step, client.key)


def suspected(step: Step, event: Suspected) -> None:
    client = step.state.clients.get(event.client)
    if client is not None and is_present(client):
        step.put_client(client.key, suspected=True)


def recovered(step: Step, event: Recovered) -> None:
    client = _speaker(step, event.client)
    if client is not None and client.suspected:
        step.put_client(client.key, suspected=False)


def left(step: Step, event: Left) -> None:
    """Its unsent work is free at once. An operator may also remove a key that has not been seen yet."""
    client = step.state.clients.get(event.client)
    if event.how == "kicked":
        if client is None:
            step.add_client(Client(key=event.client, boot="", label="", status="kicked"))
            return
        if client.status == "kicked":
            return
    elif client is None or not is_live(client):
        return
    reason = {
        "lost": "its client was not heard any more",
        "left": "its client left",
        "kicked": "its client was removed by the operator",
    }[event.how]
    release_work(step, event.client, f"{reason}: {event.reason}" if event.reason else reason)
    was_live = is_live(client)
    step.put_client(event.client, status=event.how, suspected=False, round=None)
    if event.how == "kicked" and was_live:
        said = f": {event.reason}" if event.reason else ""
        text = f"the operator has removed this client from the run{said}"
        step.send(event.client, Dismissed(reason=text, final=True))
    elif event.how == "lost":
        step.send(event.client, Dismissed(reason="not heard for too long; sign in again", final=False))


def _speaker(step: Step, key: ClientId) -> Client | None:
    """The live client that says something; one whose session is over is told so, and can sign in again."""
    client = step.state.clients.get(key)
    if client is not None and not is_live(client):
        step.send(key, session_ended(client))
        return None
    return client
