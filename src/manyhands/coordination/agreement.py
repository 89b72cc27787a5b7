"""Which contributions of a round are agreed: by the aggregator in a star, by witnesses in a mesh.

Star: the aggregator's accepting verdict means that it has merged the update; the order of verdicts is the order
of merging. There is no barrier: work and verdicts overlap.

Mesh: commits close first, when every present client that was given work has committed, or at the deadline. Then
what is stored is revealed, and the rest as it comes. The witnesses of a round are fixed at that moment: the
present and ready clients, at most 31, those with most counted contributions first; with the server that is at most
32. For one contribution,

    n       = the server + the other witnesses that have given a verdict or are present and ready,
    quorum  = 1, 2, 2 for n = 1, 2, 3, then floor(2n/3),

the sender never judges its own, and the server stands for "has it", as it has stored it. So many accepting ones
agree it; so many objections, or so many that the quorum is out of reach, refuse it; whichever is first. A witness
that goes is no longer part of n, but a verdict that it has given stays. When no other witness is there the server
alone suffices, unless the sender is not there either: then nobody is in a hurry, and the deadline decides.
"""

from __future__ import annotations

from manyhands.coordination.effects import Abandon, Reveal
from manyhands.coordination.events import Verdict
from manyhands.coordination.presence import by_reliability, is_present, present_clients
from manyhands.coordination.rounds import SERVER, give_back, refuse
from manyhands.coordination.state import Entry, Round, RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import AGGREGATOR, EVERYONE, AssignmentId, ClientId

MOST_WITNESSES = 32
"""The server among them."""


def quorum(n: int) -> int:
    """How many of n witnesses must have an update: 1, 2, 2, then floor(2n/3)."""
    return n if n <= 2 else max(2, 2 * n // 3)


def judged(step: Step, event: Verdict) -> None:
    """A verdict on an opened update. From anybody else than those who are asked it means nothing."""
    round_ = step.state.rounds.get(event.round)
    entry = round_.entries.get(event.assignment) if round_ is not None else None
    if round_ is None or entry is None or entry.status != "opened" or round_.stage == "close":
        return
    if step.state.plan.topology == "star":
        if event.by != AGGREGATOR:
            return
        if event.accepted:
            agree(step, event.round, event.assignment)
        else:
            refuse(step, event.round, event.assignment, event.reason or "the aggregator refused it")
        return
    if not entry.revealed or event.by not in round_.witnesses or event.by == entry.assignment.client:
        return
    if event.by in entry.witnesses or event.by in entry.objections:
        return
    if event.accepted:
        step.put_entry(event.round, event.assignment, witnesses=entry.witnesses | {event.by})
    else:
        reason = entry.reason
        if event.reason not in reason:  # whoever is first with another one hides nothing
            reason = f"{reason}; {event.reason}" if reason else event.reason
        step.put_entry(event.round, event.assignment, objections=entry.objections | {event.by}, reason=reason)


def agree(step: Step, number: int, assignment: AssignmentId) -> None:
    step.put_entry(number, assignment, status="agreed", reason="")
    step.put_round(number, agreed=(*step.state.rounds[number].agreed, assignment))


# ------------------------------------------------------------------------------------------- mesh
def maybe_close_commits(step: Step, number: int) -> None:
    """Close them when nobody present still works, or at the deadline; never while there is none."""
    round_ = step.state.rounds[number]
    if round_.stage != "work":
        return
    entries = round_.entries.values()
    if not any(entry.status in ("committed", "opened") for entry in entries):
        return
    clients = step.state.clients
    working = any(e.status == "assigned" and is_present(clients.get(e.assignment.client)) for e in entries)
    outstanding = any(entry.status == "assigned" for entry in entries)
    somebody_waits = not outstanding or bool(present_clients(step.state))
    if (not working and somebody_waits) or step.now_ms >= round_.deadline_ms:
        close_commits(step, number)


def close_commits(step: Step, number: int) -> None:
    """From now on updates are revealed, so nothing new may be committed to; agreement gets a timeout of its own."""
    for identifier, entry in step.state.rounds[number].entries.items():
        if entry.status == "assigned":
            reason = "commits closed before the work was done"
            give_back(step, number, identifier, reason)
            abandon = Abandon(round=number, assignment=identifier, reason=reason)
            step.send(entry.assignment.client, abandon)
    ready = [client for client in present_clients(step.state) if client.status == "ready"]
    timeout = step.state.rounds[number].terms.deadline_ms - step.state.rounds[number].opened_ms
    step.put_round(
        number,
        stage="agree",
        commits_closed=True,
        witnesses=tuple(by_reliability(ready)[: MOST_WITNESSES - 1]),
        deadline_ms=step.now_ms + timeout,
    )


def reveal(step: Step, number: int) -> None:
    """What is stored and not yet known to the others, after commits have closed."""
    round_ = step.state.rounds[number]
    if not round_.commits_closed:
        return
    stored = [entry for entry in round_.entries.values() if entry.status == "opened" and not entry.revealed]
    for entry in stored:
        step.put_entry(number, entry.assignment.id, revealed=True)
    if stored:
        shown = tuple(entry.contribution for entry in stored if entry.contribution is not None)
        step.send(EVERYONE, Reveal(round=number, contributions=shown))


def decide(step: Step, number: int) -> None:
    """Agree or refuse every revealed update whose witnesses have said enough."""
    round_ = step.state.rounds[number]
    for identifier, entry in round_.entries.items():
        if entry.status != "opened" or not entry.revealed:
            continue
        others = _others(step.state, round_, entry)
        n = 1 + len(others)
        sender = entry.assignment.client
        if not others and any(w != sender for w in round_.witnesses):
            if is_present(step.state.clients.get(sender)):
                agree(step, number, identifier)
            continue
        objections = len(entry.objections & others)
        if objections >= quorum(n) or n - objections < quorum(n):
            refuse(step, number, identifier, f"{objections} witnesses object: {entry.reason or 'no reason'}")
        elif len(entry.witnesses & (others | {SERVER})) >= quorum(n):
            agree(step, number, identifier)


def _others(state: RunState, round_: Round, entry: Entry) -> frozenset[ClientId]:
    """The clients that count for this contribution, its sender excepted."""
    spoken = (entry.witnesses | entry.objections) - {SERVER}
    able = set()
    for witness in round_.witnesses:
        client = state.clients.get(witness)
        if client is not None and client.status == "ready" and is_present(client):
            able.add(witness)
    return frozenset((spoken | able) - {entry.assignment.client})


def unheard(state: RunState, number: int, witness: ClientId) -> Reveal | None:
    """For a witness that has lost everything: what it has still to judge."""
    round_ = state.rounds[number]
    if witness not in round_.witnesses:
        return None
    open_ = tuple(
        entry.contribution
        for entry in round_.entries.values()
        if entry.revealed
        and entry.status == "opened"
        and entry.contribution is not None
        and witness not in entry.witnesses | entry.objections
        and witness != entry.assignment.client
    )
    return Reveal(round=number, contributions=open_) if open_ else None
