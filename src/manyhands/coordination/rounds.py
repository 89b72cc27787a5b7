"""Rounds from their opening to the last contribution: terms, assignments, and what clients send in.

Weight, steps and ranges come from the assignment that is made here, never from what a client says. At any time a
client has at most one piece of work of a round that is not given back.
"""

from __future__ import annotations

import hashlib
import math

from manyhands.coordination import data_ranges
from manyhands.coordination.data_ranges import Books
from manyhands.coordination.deadlines import round_timeout_ms, typical_ms
from manyhands.coordination.effects import Abandon, Dismissed, Merge, Work
from manyhands.coordination.events import Committed, Contributed, WorkFailed
from manyhands.coordination.pace import median_step_us, steps_for
from manyhands.coordination.presence import in_step_clients, is_live, present_clients
from manyhands.coordination.schedule import learning_rates, outer_terms
from manyhands.coordination.state import Client, Entry, Round, RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import (
    AGGREGATOR,
    Assignment,
    AssignmentId,
    ClientId,
    Contribution,
    IndexRange,
    RoundTerms,
)

SERVER = "server"
"""The server's name among the witnesses of a mesh: it has what it has stored."""

MOST_ATTEMPTS = 3
"""How often a client that goes and comes back is given work in one round."""


# --------------------------------------------------------------------------------------- opening
def open_round(step: Step) -> None:
    """Give every client that is in step a piece of work. The caller has checked that it is time."""
    state = step.state
    number, first_step = state.next_round, state.inner_steps
    timeout = round_timeout_ms(state)
    terms = RoundTerms(
        round=number,
        fragment=number % state.plan.rounds.fragments,
        first_step=first_step,
        learning_rates=learning_rates(state.plan, first_step),
        outer=outer_terms(state.plan, state.outer_steps + 1),
        deadline_ms=step.now_ms + timeout,
    )
    step.add_round(
        Round(
            number=number,
            stage="work",
            terms=terms,
            opened_ms=step.now_ms,
            entries={},
            deadline_ms=terms.deadline_ms,
        )
    )
    step.change(
        next_round=number + 1,
        inner_steps=first_step + state.plan.local.steps,
        last_timeout_ms=timeout,
        opening_ms=None,
    )
    workers = in_step_clients(state)
    median_us = median_step_us(workers)
    for client in workers:
        assign(step, number, client, steps_for(state.plan, client.step_us, median_us))


def assign(step: Step, number: int, client: Client, steps: int) -> None:
    """Give `client` work in round `number`: an assignment with an id of its own, its data, and an effect."""
    state = step.state
    identifier = f"{number}-{state.next_ordinal}"
    samples = steps * state.plan.local.batch_size
    ranges: tuple[IndexRange, ...] = ()
    if state.plan.data.kind == "shared":
        taken, ranges = data_ranges.take(books(state), identifier, samples)
        put_books(step, taken)
    assignment = Assignment(
        id=identifier,
        round=number,
        client=client.key,
        steps=steps,
        batch_size=state.plan.local.batch_size,
        ranges=ranges,
        weight=samples if state.plan.merge.weight == "samples" else 1,
        seed=work_seed(step.seed, state.plan.seed, number, client.key),
    )
    step.change(next_ordinal=state.next_ordinal + 1)
    step.add_entry(number, Entry(assignment=assignment, status="assigned", assigned_ms=step.now_ms))
    step.send(client.key, Work(assignment=assignment, terms=state.rounds[number].terms))


def work_seed(seed: int, plan_seed: int, number: int, client: ClientId) -> int:
    """Of the global RNG before a piece of work; 0 <= seed < 2**63. The same for the same client and round."""
    text = f"manyhands work {seed} {plan_seed} {number} {client}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def books(state: RunState) -> Books:
    return (*state.older_data, state.data)


def put_books(step: Step, ledgers: Books) -> None:
    step.change(older_data=ledgers[:-1], data=ledgers[-1])


# ------------------------------------------------------------------- work that was lost in a round
def give_out_again(step: Step, number: int) -> None:
    """Work for clients that lost theirs in this round and are back, where it does not make the others wait.

    While others work: only as many steps as fit into the time that they still need. When nobody has anything
    left to do and nothing counts yet: all the work, to whoever is in step, newcomers included.
    """
    round_ = step.state.rounds[number]
    if round_.stage != "work" or number != step.state.closed_rounds:
        return
    idle = [c for c in in_step_clients(step.state) if may_work_again(round_, c.key)]
    if not idle:
        return
    working = [e for e in round_.entries.values() if e.status in ("assigned", "committed")]
    started_over = not working and all(e.status in ("given_back", "refused") for e in round_.entries.values())
    median_us = median_step_us(present_clients(step.state))
    for client in idle:
        share = 1.0 if started_over else _share_left(step, round_, client.key, working)
        if share is not None:
            assign(step, number, client, steps_for(step.state.plan, client.step_us, median_us, share))


def may_work_again(round_: Round, client: ClientId) -> bool:
    """Nothing of it counts or is under way, it has not failed, and it has not been lost too often."""
    own = [entry for entry in round_.entries.values() if entry.assignment.client == client]
    return len(own) < MOST_ATTEMPTS and all(entry.status == "given_back" and entry.lost for entry in own)


def _share_left(step: Step, round_: Round, client: ClientId, working: list[Entry]) -> float | None:
    """The part of a full piece of work that ends with the others'; None: too little, or nothing was lost."""
    usual = typical_ms(step.state)
    if not usual or not working or all(e.assignment.client != client for e in round_.entries.values()):
        return None
    end = min(max(entry.assigned_ms for entry in working) + usual, round_.deadline_ms)
    share = (end - step.now_ms) / usual
    least = math.ceil(step.state.plan.local.steps * step.state.plan.rounds.min_work_share)
    return share if share * step.state.plan.local.steps >= max(1, least) else None


def give_back(step: Step, number: int, assignment: AssignmentId, reason: str, *, lost: bool = False) -> None:
    """End a piece of work that will not come: its samples are free again."""
    step.put_entry(number, assignment, status="given_back", reason=reason, lost=lost)
    put_books(step, data_ranges.give_back(books(step.state), assignment))


def release_work(step: Step, client: ClientId, reason: str) -> list[AssignmentId]:
    """Give back what a client that goes, or starts again, has not sent. What is on our disk stays."""
    released = []
    for number, round_ in list(step.state.rounds.items()):
        for identifier, entry in round_.entries.items():
            if entry.assignment.client == client and entry.status in ("assigned", "committed"):
                give_back(step, number, identifier, reason, lost=True)
                released.append(identifier)
        if client in round_.witnesses:
            step.put_round(number, witnesses=tuple(w for w in round_.witnesses if w != client))
    return released


# ------------------------------------------------------------------------------- what clients send
def committed(step: Step, event: Committed) -> None:
    """The first commit binds; repeated ones change nothing."""
    entry = _entry_for(step, event.client, event.round, event.assignment)
    if entry is None or entry.status != "assigned":
        return
    contribution = Contribution(
        assignment=event.assignment, round=event.round, client=event.client, commit=event.commit
    )
    step.put_entry(event.round, event.assignment, status="committed", contribution=contribution)


def contributed(step: Step, event: Contributed) -> None:
    """The update is stored: pending from now on, and on its way to whoever judges it.

    It brings its commit along, so an update whose Committed was never heard of is as good, as long as nothing
    was revealed: then, in a mesh, only what was committed before is taken (`agreement.close_commits`).
    """
    contribution = event.contribution
    entry = _entry_for(step, contribution.client, contribution.round, contribution.assignment)
    if entry is None or entry.status not in ("assigned", "committed"):
        return
    fault = _fault_of(contribution, entry)
    if fault:
        refuse(step, contribution.round, contribution.assignment, fault)
        step.send(
            contribution.client,
            Abandon(round=contribution.round, assignment=contribution.assignment, reason=fault),
        )
        return
    assert contribution.update is not None
    assert contribution.claims is not None
    mesh = step.state.plan.topology == "mesh"
    step.put_entry(
        contribution.round,
        contribution.assignment,
        status="opened",
        contribution=contribution,
        opened_ms=step.now_ms,
        witnesses=frozenset({SERVER}) if mesh else frozenset(),
    )
    put_books(step, data_ranges.hand_in(books(step.state), contribution.assignment))
    if not mesh:
        step.send(
            AGGREGATOR, merge_of(step.state.rounds[contribution.round].entries[contribution.assignment])
        )


def merge_of(entry: Entry) -> Merge:
    """What the aggregator is told of an opened contribution."""
    contribution = entry.contribution
    assert contribution is not None
    assert contribution.update is not None
    assert contribution.claims is not None
    return Merge(
        round=contribution.round,
        assignment=contribution.assignment,
        client=contribution.client,
        update=contribution.update,
        weight=entry.assignment.weight,
        norm=contribution.claims.norm,
    )


def refuse(step: Step, number: int, assignment: AssignmentId, reason: str) -> None:
    """An update that was sent and will not count, or one that does not fit its commit."""
    step.put_entry(number, assignment, status="refused", reason=reason)
    put_books(step, data_ranges.give_back(books(step.state), assignment))


def work_failed(step: Step, event: WorkFailed) -> None:
    """Its range is free at once; the client gets no more work in this round."""
    for number, round_ in step.state.rounds.items():
        entry = round_.entries.get(event.assignment)
        if entry is None or entry.assignment.client != event.client or round_.stage == "close":
            continue
        if entry.status in ("assigned", "committed"):
            give_back(step, number, event.assignment, f"the client could not do it: {event.reason}")
            return


def _fault_of(contribution: Contribution, entry: Entry) -> str:
    """What is wrong with an opened contribution; empty when nothing is."""
    before = entry.contribution
    if before is not None and before.commit != contribution.commit:
        return "the update is not the one that was committed to"
    if contribution.update is None or contribution.claims is None:
        return "the contribution names no update"
    claims = contribution.claims
    if not math.isfinite(claims.norm) or claims.norm < 0:
        return f"the claimed norm is {claims.norm}, expected a finite number of at least 0"
    if claims.loss is not None and not math.isfinite(claims.loss):
        return f"the training loss is {claims.loss}: the work has diverged"
    return ""


def _entry_for(step: Step, client: ClientId, number: int, assignment: AssignmentId) -> Entry | None:
    """The entry of a message from `client`, or None; a sender that still works on it is told what became of it."""
    sender = step.state.clients.get(client)
    if sender is None:
        return None
    if not is_live(sender):
        step.send(client, session_ended(sender))
        return None
    round_ = step.state.rounds.get(number)
    entry = round_.entries.get(assignment) if round_ is not None else None
    if entry is not None and entry.assignment.client != client:
        return None
    if round_ is not None and entry is not None and round_.stage != "close" and entry.status != "given_back":
        return entry
    if entry is not None and entry.status in ("opened", "agreed", "refused"):
        return None
    counted = any(c.assignment == assignment for past in step.state.history for c in past.closing.counted)
    if not counted:
        reason = entry.reason if entry is not None else "the round is closed, or the work was never given out"
        step.send(client, Abandon(round=number, assignment=assignment, reason=reason))
    return None


def session_ended(client: Client) -> Dismissed:
    """To a client that speaks although its session is over."""
    if client.status == "kicked":
        return Dismissed(reason="the operator has removed this client from the run", final=True)
    return Dismissed(reason="this session is over; sign in again", final=False)
