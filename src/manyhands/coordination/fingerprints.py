"""Which fingerprints are the agreed ones, and what happens to a client that has others.

In a star there is one, of public, and it is the aggregator's. In a mesh every client advances, so there are two, of
public and of outer, and they are agreed on together: those that most of the present clients report, or, when all
have reported and none has most, or a stored snapshot has waited too long for the others, those of the largest group
(of two equal groups the one with the most reliable client). A client with others starts again from a snapshot, which
leads it to what the closings say. When nobody who is there holds the agreed ones any more, they are agreed anew.
"""

from __future__ import annotations

import dataclasses

from manyhands.coordination.effects import Closed
from manyhands.coordination.events import Fingerprinted
from manyhands.coordination.newcomers import catch_up, fingerprint_at, held_at
from manyhands.coordination.presence import by_reliability, is_live, is_present, present_clients
from manyhands.coordination.rounds import release_work
from manyhands.coordination.state import RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import ClientId, Held


def fingerprinted(step: Step, event: Fingerprinted) -> None:
    """A client's report. Where the agreed fingerprint is known and differs, the client starts again."""
    if not is_live(step.state.clients.get(event.client)):
        return
    if step.state.plan.topology == "mesh":
        note_report(step, event.client, event.round, event.held)
        compare_reports(step, event.client)
        return
    agreed = fingerprint_at(step.state, event.round + 1)
    if agreed is not None and agreed != event.fingerprint:
        resync(step, event.client, event.round)


def note_report(step: Step, client: ClientId, number: int, held: Held) -> None:
    if any(closed.closing.round == number for closed in step.state.history):
        of_round = {**step.state.reported.get(number, {}), client: held}
        step.change(reported={**step.state.reported, number: of_round})


def compare_reports(step: Step, client: ClientId) -> None:
    """Mesh: has this client reported something else than what is agreed? Also asked when it becomes ready."""
    for closed in step.state.history:
        reported = step.state.reported.get(closed.closing.round, {}).get(client)
        if reported is not None and closed.held not in (None, reported):
            resync(step, client, closed.closing.round)
            return


def agree_on_fingerprints(step: Step, *, overdue: int | None = None) -> None:
    """Mesh: for every closing whose fingerprint is not known yet, see whether the reports suffice.

    `overdue`: a closing for which nobody else is waited for any more.
    """
    if step.state.plan.topology != "mesh":
        return
    for at, closed in enumerate(step.state.history):
        reports = step.state.reported.get(closed.closing.round)
        if closed.held is not None or not reports:
            continue
        number = closed.closing.round
        agreed = _agreed(step.state, number, reports, enough=number == overdue)
        if agreed is None:
            continue
        history = list(step.state.history)
        history[at] = _with(closed, agreed)
        step.change(history=tuple(history))
        for client, held in reports.items():
            if held != agreed:
                resync(step, client, number)


def _with(closed: Closed, agreed: Held) -> Closed:
    return dataclasses.replace(closed, fingerprint=agreed.public, outer_fingerprint=agreed.outer)


def _agreed(state: RunState, number: int, reports: dict[ClientId, Held], *, enough: bool) -> Held | None:
    """Of those who are there and far enough to report soon: a client that hangs does not hold up the others."""
    voters = set(reports)
    for voter in present_clients(state):
        if voter.status == "ready" and voter.round is not None and voter.round >= number:
            voters.add(voter.key)
    groups: dict[Held, list[ClientId]] = {}
    for client, held in reports.items():
        groups.setdefault(held, []).append(client)
    largest = max(len(members) for members in groups.values())
    if 2 * largest <= len(voters) and len(reports) < len(voters) and not enough:
        return None
    candidates = [held for held, members in groups.items() if len(members) == largest]
    known = [state.clients[client] for client in reports if client in state.clients]
    order = by_reliability(known)
    return min(candidates, key=lambda held: min(order.index(client) for client in groups[held]))


def resync(step: Step, key: ClientId, number: int) -> None:
    """What it holds is not everybody's: what it works on is worth nothing, and it starts from a snapshot.

    Once for what the run has seen by now: a client that gets to something else from the same snapshot again
    may be the one that is right, and asking it for ever would help nobody.
    """
    client = step.state.clients.get(key)
    if client is None or client.status != "ready" or number < client.resynced_at:
        return
    release_work(step, key, f"what it held differed from what was agreed after round {number}")
    reports = {
        r: {who: said for who, said in of_round.items() if who != key}
        for r, of_round in step.state.reported.items()
    }
    step.change(reported=reports)  # what it says from now on is of what it is given now
    step.put_client(
        key,
        status="catching_up",
        round=None,
        resynced=client.resynced + 1,
        resynced_at=step.state.closed_rounds,
    )
    step.send(key, catch_up(step.state, None))


def agree_anew(step: Step, number: int) -> Held | None:
    """Mesh: what is agreed after closing `number`; something else when no present client reports it any more.

    It happens when the clients that agreed have gone, or have drifted since.
    """
    agreed = held_at(step.state, number + 1)
    reports = {
        client: held
        for client, held in step.state.reported.get(number, {}).items()
        if is_present(step.state.clients.get(client))
    }
    if agreed in reports.values():
        return agreed
    anew = _agreed(step.state, number, reports, enough=False) if reports else None
    if anew is None:
        return agreed
    step.change(
        history=tuple(
            _with(closed, anew) if closed.closing.round == number else closed for closed in step.state.history
        )
    )
    return anew
