"""Which fingerprint of public is the agreed one, and what happens to a client that has another.

In a star it is the aggregator's. In a mesh it is the one that most of the present clients report, or, when all have
reported and none has most, or a stored snapshot has waited too long for the others, that of the largest group (of
two equal groups the one with the most reliable client). A client with another one starts again from a snapshot,
which leads it to what the closings say. When nobody who is there holds the agreed one any more, it is agreed anew.
"""

from __future__ import annotations

import dataclasses

from manyhands.coordination.newcomers import catch_up, fingerprint_at
from manyhands.coordination.presence import by_reliability, is_live, is_present, present_clients
from manyhands.coordination.rounds import release_work
from manyhands.coordination.state import RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import ClientId, Fingerprint, Fingerprinted


def fingerprinted(step: Step, event: Fingerprinted) -> None:
    """A client's report. Where the agreed fingerprint is known and differs, the client starts again."""
    if not is_live(step.state.clients.get(event.client)):
        return
    if step.state.plan.topology == "mesh":
        note_report(step, event.client, event.round, event.fingerprint)
        compare_reports(step, event.client)
        return
    agreed = fingerprint_at(step.state, event.round + 1)
    if agreed is not None and agreed != event.fingerprint:
        resync(step, event.client, event.round)


def note_report(step: Step, client: ClientId, number: int, fingerprint: Fingerprint) -> None:
    if any(closed.closing.round == number for closed in step.state.history):
        of_round = {**step.state.fingerprints.get(number, {}), client: fingerprint}
        step.change(fingerprints={**step.state.fingerprints, number: of_round})


def compare_reports(step: Step, client: ClientId) -> None:
    """Mesh: has this client reported another fingerprint than the agreed one? Also asked when it becomes ready."""
    for closed in step.state.history:
        reported = step.state.fingerprints.get(closed.closing.round, {}).get(client)
        if reported is not None and closed.fingerprint not in (None, reported):
            resync(step, client, closed.closing.round)
            return


def agree_on_fingerprints(step: Step, *, overdue: int | None = None) -> None:
    """Mesh: for every closing whose fingerprint is not known yet, see whether the reports suffice.

    `overdue`: a closing for which nobody else is waited for any more.
    """
    if step.state.plan.topology != "mesh":
        return
    for at, closed in enumerate(step.state.history):
        reports = step.state.fingerprints.get(closed.closing.round)
        if closed.fingerprint is not None or not reports:
            continue
        number = closed.closing.round
        agreed = _agreed(step.state, number, reports, enough=number == overdue)
        if agreed is None:
            continue
        history = list(step.state.history)
        history[at] = dataclasses.replace(closed, fingerprint=agreed)
        step.change(history=tuple(history))
        for client, fingerprint in reports.items():
            if fingerprint != agreed:
                resync(step, client, number)


def _agreed(
    state: RunState, number: int, reports: dict[ClientId, Fingerprint], *, enough: bool
) -> Fingerprint | None:
    """Of those who are there and far enough to report soon: a client that hangs does not hold up the others."""
    voters = set(reports)
    for voter in present_clients(state):
        if voter.status == "ready" and voter.round is not None and voter.round >= number:
            voters.add(voter.key)
    groups: dict[Fingerprint, list[ClientId]] = {}
    for client, fingerprint in reports.items():
        groups.setdefault(fingerprint, []).append(client)
    largest = max(len(members) for members in groups.values())
    if 2 * largest <= len(voters) and len(reports) < len(voters) and not enough:
        return None
    candidates = [f for f, members in groups.items() if len(members) == largest]
    known = [state.clients[client] for client in reports if client in state.clients]
    order = by_reliability(known)
    return min(candidates, key=lambda f: min(order.index(client) for client in groups[f]))


def resync(step: Step, key: ClientId, number: int) -> None:
    """Its public is not everybody's: what it works on is worth nothing, and it starts from a snapshot.

    Once for what the run has seen by now: a client that gets to another fingerprint from the same snapshot again
    may be the one that is right, and asking it for ever would help nobody.
    """
    client = step.state.clients.get(key)
    if client is None or client.status != "ready" or number < client.resynced_at:
        return
    release_work(step, key, f"its public differed from the agreed one after round {number}")
    reports = {
        r: {who: said for who, said in of_round.items() if who != key}
        for r, of_round in step.state.fingerprints.items()
    }
    step.change(fingerprints=reports)  # what it says from now on is of its new public
    step.put_client(
        key,
        status="catching_up",
        round=None,
        resynced=client.resynced + 1,
        resynced_at=step.state.closed_rounds,
    )
    step.send(key, catch_up(step.state, None))


def agree_anew(step: Step, number: int) -> Fingerprint | None:
    """Mesh: the agreed fingerprint after closing `number`; another one when no present client reports it any more.

    It happens when the clients that agreed have gone, or have drifted since.
    """
    agreed = fingerprint_at(step.state, number + 1)
    reports = {
        client: fingerprint
        for client, fingerprint in step.state.fingerprints.get(number, {}).items()
        if is_present(step.state.clients.get(client))
    }
    if agreed in reports.values():
        return agreed
    anew = _agreed(step.state, number, reports, enough=False) if reports else None
    if anew is None:
        return agreed
    step.change(
        history=tuple(
            dataclasses.replace(closed, fingerprint=anew) if closed.closing.round == number else closed
            for closed in step.state.history
        )
    )
    return anew
