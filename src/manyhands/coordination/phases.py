"""The phases of a run: waiting, warming up, training, checkpointing, finished; paused and failed beside them.

A run waits while fewer than `membership.min_clients` are there, before its first round and at any boundary
between rounds. It warms up once, before the first round: everybody who has joined gets `rounds.warmup_s` to load.
"""

from __future__ import annotations

from manyhands.coordination.deadlines import milliseconds
from manyhands.coordination.effects import Abandon, PhaseChanged
from manyhands.coordination.events import Failed, PauseAsked, ServerStarted
from manyhands.coordination.presence import clients_needed, in_step_clients, is_present, present_clients
from manyhands.coordination.rounds import open_round
from manyhands.coordination.state import Phase
from manyhands.coordination.step import Step
from manyhands.coordination.types import EVERYONE

GRACE_MS = 2000
"""After enough clients have applied a closing, the others have so long to do so too; or as long as those took, up to
rounds.lost_after_s."""


def enter(step: Step, phase: Phase, reason: str) -> None:
    step.change(phase=phase, reason=reason)
    step.send(EVERYONE, PhaseChanged(phase=phase, reason=reason))


def move_phase(step: Step) -> None:
    """At most one change of phase, or one round opened; called until nothing changes."""
    phase = step.state.phase
    if phase == "waiting":
        _wait(step)
    elif phase == "warming_up":
        _warm_up(step)
    elif phase == "training":
        _train(step)
    elif phase == "checkpointing":
        total = step.state.plan.rounds.total
        if total in step.state.evaluations and step.state.checkpointed == total:
            enter(step, "finished", f"all {total} rounds are done and the checkpoint is written")


def _wait(step: Step) -> None:
    present, needed = len(present_clients(step.state)), clients_needed(step.state)
    if present < needed:
        return
    if step.state.next_round > 0:
        enter(step, "training", f"{present} of {needed} clients are here: the run goes on")
        return
    step.change(phase_deadline_ms=step.now_ms + milliseconds(step.state.plan.rounds.warmup_s))
    enter(step, "warming_up", f"{present} of {needed} clients are here: they load the model")


def _warm_up(step: Step) -> None:
    present, needed = present_clients(step.state), clients_needed(step.state)
    ready = [client for client in present if client.status == "ready"]
    deadline = step.state.phase_deadline_ms
    if len(present) < needed:
        step.change(phase_deadline_ms=None)
        enter(step, "waiting", f"{len(present)} of {needed} clients are here")
    elif len(ready) >= needed and (len(ready) == len(present) or deadline is None or step.now_ms >= deadline):
        step.change(phase_deadline_ms=None)
        enter(step, "training", f"{len(ready)} ready")
    elif deadline is not None and step.now_ms >= deadline:
        step.change(phase_deadline_ms=None)  # over: training starts with the first who are enough


def _train(step: Step) -> None:
    state = step.state
    total = state.plan.rounds.total
    if state.closed_rounds >= total:
        enter(step, "checkpointing", f"all {total} rounds are closed: the result is evaluated and saved")
        return
    if state.next_round >= total or state.next_round - state.closed_rounds > state.plan.rounds.lag:
        return
    if any(round_.stage == "close" for round_ in state.rounds.values()):
        return
    present, needed = present_clients(state), clients_needed(state)
    in_step = in_step_clients(state)
    if len(in_step) < needed:
        if state.opening_ms is not None:
            step.change(opening_ms=None)
        if len(present) < needed and not state.rounds:
            enter(step, "waiting", f"{len(present)} of {needed} clients are here for the next round")
        return
    expected = [
        client
        for client in state.clients.values()
        if client.status == "ready"
        and is_present(client)
        and client.round is not None
        and client.round >= state.closed_rounds - 1
    ]
    if len(expected) == len(in_step) or (state.opening_ms is not None and step.now_ms >= state.opening_ms):
        open_round(step)
    elif state.opening_ms is None:
        longest = milliseconds(state.plan.rounds.lost_after_s)
        step.change(opening_ms=step.now_ms + max(GRACE_MS, min(longest, step.now_ms - state.boundary_ms)))


def pause_asked(step: Step, event: PauseAsked) -> None:
    """The open round still closes; no other one opens."""
    if step.state.phase in ("waiting", "warming_up", "training", "checkpointing"):
        step.change(resume_to=step.state.phase)
        enter(step, "paused", event.reason or "paused by the operator")


def resume_asked(step: Step) -> None:
    if step.state.phase == "paused":
        phase = step.state.resume_to or "waiting"
        step.change(resume_to=None, failed_in_a_row=0)
        enter(step, phase, "resumed by the operator")


def failed(step: Step, event: Failed) -> None:
    """For good: whoever works may stop."""
    for number, round_ in step.state.rounds.items():
        for entry in round_.entries.values():
            client = step.state.clients.get(entry.assignment.client)
            if entry.status in ("assigned", "committed") and is_present(client):
                abandon = Abandon(round=number, assignment=entry.assignment.id, reason="the run has failed")
                step.send(entry.assignment.client, abandon)
    enter(step, "failed", event.reason)


def server_started(step: Step, event: ServerStarted) -> None:
    """Nobody is to blame for the time that the server was away: deadlines move, and nobody is suspected.

    Work that was under way meanwhile measures nothing: its round is marked.
    """
    downtime = max(0, event.downtime_ms)
    state = step.state
    for number, round_ in state.rounds.items():
        step.put_round(number, deadline_ms=round_.deadline_ms + downtime, interrupted=True)
    for key, client in state.clients.items():
        if client.suspected:
            step.put_client(key, suspected=False)
    step.change(boundary_ms=state.boundary_ms + downtime)
    if state.phase_deadline_ms is not None:
        step.change(phase_deadline_ms=state.phase_deadline_ms + downtime)
    if state.opening_ms is not None:
        step.change(opening_ms=state.opening_ms + downtime)
    if state.snapshot_asked is not None:
        asked, whom, when_ms = state.snapshot_asked
        step.change(snapshot_asked=(asked, whom, when_ms + downtime))
