"""The run's state machine: `tick(state, events, now, seed) -> (state, effects)`, pure and total.

Each event is recorded by its rule, and then everything that follows from the state and the time is done
(`_follow`), whatever the event was; so deadlines are met by any event, and `ClockPassed` only makes sure that
there is one. An event that is late, repeated, reordered or from a stranger changes nothing; where that helps, the
sender is told how to recover. One event is one step: many in one tick and one by one give the same.

The shell stores (sequence, now_ms, seed, event) before it lets an effect go; folding `tick` over the records gives
the same state and effects again. Its clock should be monotonic; a time before the latest one counts as that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyhands.coordination.agreement import judged
from manyhands.coordination.closing import advanced, move_round
from manyhands.coordination.data_ranges import open_epoch
from manyhands.coordination.deadlines import snapshot_timeout_ms
from manyhands.coordination.effects import Effect
from manyhands.coordination.events import (
    Advanced,
    Checkpointed,
    ClockPassed,
    Committed,
    Contributed,
    Evaluated,
    Event,
    Failed,
    Fingerprinted,
    Joined,
    Left,
    PauseAsked,
    Ready,
    Recovered,
    ResumeAsked,
    ServerStarted,
    SnapshotStored,
    Suspected,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.fingerprints import agree_on_fingerprints, fingerprinted
from manyhands.coordination.membership import joined, left, ready, recovered, suspected
from manyhands.coordination.phases import failed, move_phase, pause_asked, resume_asked, server_started
from manyhands.coordination.rounds import committed, contributed, work_failed
from manyhands.coordination.snapshots import (
    NOBODY,
    checkpointed,
    evaluated,
    keep_snapshot,
    snapshot_stored,
    take_offered_snapshot,
    watch_snapshot,
)
from manyhands.coordination.state import Round, RunState
from manyhands.coordination.step import Step
from manyhands.coordination.types import Snapshot
from manyhands.plan.schema import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedEffect:
    """The n-th effect (from 0) of the event with this sequence number: the id under which it is delivered."""

    sequence: int
    n: int
    effect: Effect

    @property
    def id(self) -> tuple[int, int]:
        return (self.sequence, self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """What came of some events. `closed`: the rounds that were published, with all their entries."""

    state: RunState
    effects: tuple[NumberedEffect, ...]
    closed: tuple[Round, ...] = ()


def initial_state(run_id: str, plan: Plan, samples: int, first_snapshot: Snapshot) -> RunState:
    """Before the first event. `samples`: training samples of one epoch, at least 1."""
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1: a run needs something to train on")
    needed = max(1, plan.membership.min_clients)
    return RunState(
        run_id=run_id,
        plan=plan,
        phase="waiting",
        reason=f"waiting for {needed} clients" if needed > 1 else "waiting for a client",
        data=open_epoch(samples, 0),
        snapshots=(first_snapshot,),
    )


def tick(state: RunState, events: Sequence[Event], now_ms: int, seed: int) -> Tick:
    """Apply events in order, all at `now_ms`. The n-th gets sequence number state.sequence + n, from 1.

    `seed` goes into the seeds of the work that is given out; with the same one at every tick a run is repeatable.
    """
    effects: list[NumberedEffect] = []
    closed: list[Round] = []
    for event in events:
        step = Step(state, max(now_ms, state.now_ms), seed)
        step.change(sequence=state.sequence + 1, now_ms=step.now_ms)
        _record(step, event)
        _follow(step)
        state = step.state
        closed += step.closed
        effects += [
            NumberedEffect(sequence=state.sequence, n=n, effect=effect)
            for n, effect in enumerate(step.effects)
        ]
    return Tick(state=state, effects=tuple(effects), closed=tuple(closed))


def next_deadline(state: RunState) -> int | None:
    """The next time at which something happens by itself, in ms: append ClockPassed then. None: nothing will."""
    if state.phase in ("finished", "failed"):
        return None
    oldest = state.rounds.get(state.closed_rounds)  # the only one that can close
    times = [oldest.deadline_ms] if oldest is not None and oldest.stage != "close" else []
    if state.phase == "warming_up" and state.phase_deadline_ms is not None:
        times.append(state.phase_deadline_ms)
    if state.phase == "training" and state.opening_ms is not None:
        times.append(state.opening_ms)
    if state.snapshot_asked is not None and state.snapshot_asked[1] != NOBODY:
        times.append(state.snapshot_asked[2] + snapshot_timeout_ms(state))
    return min(times, default=None)


def _record(step: Step, event: Event) -> None:
    """What the event says, and nothing else. A run that is over takes note only of who comes and goes."""
    match event:
        case Joined():
            joined(step, event)
        case Ready():
            ready(step, event)
        case Suspected():
            suspected(step, event)
        case Recovered():
            recovered(step, event)
        case Left():
            left(step, event)
        case ServerStarted():
            server_started(step, event)
        case _ if step.state.phase not in ("finished", "failed"):
            _record_work(step, event)


def _record_work(step: Step, event: Event) -> None:
    match event:
        case Committed():
            committed(step, event)
        case Contributed():
            contributed(step, event)
        case WorkFailed():
            work_failed(step, event)
        case Verdict():
            judged(step, event)
        case Advanced():
            advanced(step, event)
        case Fingerprinted():
            fingerprinted(step, event)
        case SnapshotStored():
            snapshot_stored(step, event)
        case Evaluated():
            evaluated(step, event)
        case Checkpointed():
            checkpointed(step, event)
        case PauseAsked():
            pause_asked(step, event)
        case ResumeAsked():
            resume_asked(step)
        case Failed():
            failed(step, event)
        case ClockPassed():
            pass  # time has passed: `_follow` sees it


def _follow(step: Step) -> None:
    """Everything that follows, until nothing does. It ends: every pass moves a round, a phase or a request on."""
    if step.state.snapshots_taken == 0:
        keep_snapshot(step, step.state.snapshots[0])
    before = None
    while step.state is not before and step.state.phase not in ("finished", "failed"):
        before = step.state
        for number in sorted(step.state.rounds):
            move_round(step, number)
        agree_on_fingerprints(step)
        take_offered_snapshot(step)
        watch_snapshot(step)
        move_phase(step)
