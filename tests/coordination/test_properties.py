"""A world of clients, an aggregator and an evaluator around `tick`, driven at random, in a star and in a mesh.

Messages of clients reach the server late, twice and in any order; clients die, come back, drift and stall; the
server restarts from its written state; the clock jumps. After every event the invariants of the state machine are
checked, and in the end the world behaves for a while: then the run must finish, and the log, done again in other
portions, must give the same state and the same effects.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from manyhands.coordination.agreement import quorum
from manyhands.coordination.data_ranges import balance
from manyhands.coordination.effects import (
    Abandon,
    Advance,
    Body,
    CatchUp,
    Closed,
    Dismissed,
    Effect,
    Evaluate,
    Merge,
    Reveal,
    TakeSnapshot,
    Work,
)
from manyhands.coordination.events import (
    Advanced,
    Checkpointed,
    ClockPassed,
    Committed,
    Contributed,
    Evaluated,
    Event,
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
from manyhands.coordination.machine import NumberedEffect, initial_state, next_deadline, tick
from manyhands.coordination.membership import may_join
from manyhands.coordination.presence import is_present, present_clients
from manyhands.coordination.records import Record, dump_state, load_state
from manyhands.coordination.situations import situation
from manyhands.coordination.types import (
    AGGREGATOR,
    EVALUATOR,
    EVERYONE,
    Assignment,
    BlobRef,
    Claims,
    Closing,
    Contribution,
    Snapshot,
)
from manyhands.plan.schema import Plan

KEYS = ("a", "b", "c", "d")
SEED = 11
EXAMPLES = int(os.environ.get("CHAOS_EXAMPLES", "0"))
"""0: as many as the tests say. Set by test_mutations.py, which wants to see a failure, not the smallest one."""


def applied(fingerprint: str, closing: Closing) -> str:
    """What becomes of public: a hash chain stands for the arithmetic."""
    if not closing.counted:
        return fingerprint
    text = fingerprint + "".join(counted.assignment for counted in closing.counted)
    return sha256(text.encode()).hexdigest()[:12]


@dataclass
class Player:
    """A client program. `inbox`: what its live session has been sent and it has not looked at."""

    key: str
    boot: int = 0
    alive: bool = False
    round: int | None = None
    fingerprint: str = ""
    inbox: list[Body] = field(default_factory=list)
    work: Assignment | None = None


class World:
    def __init__(self, plan: Plan) -> None:
        first = Snapshot(round=0, blob=BlobRef(blob="s0", size_bytes=1), fingerprint="start")
        self.initial = self.state = initial_state("r", plan, 30, first)
        self.mesh = plan.topology == "mesh"
        self.now_ms = 0
        self.records: list[Record] = []
        self.effects: list[NumberedEffect] = []
        self.players = {key: Player(key) for key in KEYS}
        self.post: list[Event] = []  # from clients, on its way
        self.aggregator: list[Body] = []
        self.evaluator: list[Body] = []
        self.public = "start"  # the aggregator's
        self.given: dict[str, Assignment] = {}
        self.closings: dict[int, Closing] = {}
        self.published: list[int] = []
        self.accepted: dict[str, None] = {}  # verdicts of the aggregator, in order

    # ------------------------------------------------------------------------------------ the shell
    def append(self, event: Event) -> None:
        done = tick(self.state, (event,), self.now_ms, SEED)
        self.state = done.state
        number = done.state.sequence
        self.records.append(Record(sequence=number, now_ms=self.now_ms, seed=SEED, event=event))
        self.effects += done.effects
        for numbered in done.effects:
            assert numbered.sequence == number
            self.deliver(numbered.effect)
        self.check()

    def deliver(self, effect: Effect) -> None:
        body = effect.body
        if isinstance(body, Work):
            given = self.given.setdefault(body.assignment.id, body.assignment)
            assert given == body.assignment, "an id is never used twice"
        if isinstance(body, Advance):
            self.note_closing(body.closing)
        if isinstance(body, Closed):
            self.note_closing(body.closing)
            assert effect.to == EVERYONE
            self.published.append(body.closing.round)
        if effect.to == AGGREGATOR:
            self.aggregator.append(body)
        elif effect.to == EVALUATOR:
            self.evaluator.append(body)
        else:
            for player in self.players.values():
                client = self.state.clients.get(player.key)
                connected = player.alive and client is not None and client.boot == f"{player.boot}"
                if connected and effect.to in (player.key, EVERYONE):
                    player.inbox.append(body)

    def note_closing(self, closing: Closing) -> None:
        assert self.closings.setdefault(closing.round, closing) == closing, "a closing is immutable"

    def sign_in(self, player: Player, *, new: bool) -> None:
        if new:
            player.boot += 1
            player.round, player.fingerprint, player.work = None, "", None
        player.inbox.clear()
        if may_join(self.state, player.key, f"{player.boot}") is None:
            player.alive = True
            self.append(Joined(client=player.key, boot=f"{player.boot}", has_round=player.round))
        else:
            player.alive = False

    def restart(self, downtime_ms: int) -> None:
        self.now_ms += downtime_ms
        written = load_state(dump_state(self.state))
        assert written == self.state
        self.state = written
        self.append(ServerStarted(downtime_ms=downtime_ms))

    # ---------------------------------------------------------------------------- the participants
    def look(self, player: Player) -> None:
        """A client deals with the first thing in its inbox; answers go into the post."""
        match player.inbox.pop(0):
            case CatchUp() as way:
                self._catch_up(player, way)
            case Closed() as closed if closed.closing.round == player.round:
                self._apply(player, closed)
                self._say_ready(player)
            case Work() as work:
                player.work = work.assignment
            case Abandon() as abandon:
                if player.work is not None and player.work.id == abandon.assignment:
                    player.work = None
            case Reveal() as reveal:
                for shown in reveal.contributions:
                    self.post.append(
                        Verdict(by=player.key, round=reveal.round, assignment=shown.assignment, accepted=True)
                    )
            case TakeSnapshot() if player.round is not None:
                self.post.append(self._snapshot(player.key, player.round, player.fingerprint))
            case Dismissed() as dismissed:
                if dismissed.final:
                    player.alive = False
                else:
                    self.sign_in(player, new=False)
            case _:
                pass

    def _catch_up(self, player: Player, way: CatchUp) -> None:
        if way.snapshot is not None:
            player.round, player.fingerprint = way.snapshot.round, way.snapshot.fingerprint
        elif player.round is None:
            player.round, player.fingerprint = 0, "start"
        for closed in way.closed:
            if closed.closing.round == player.round:
                self._apply(player, closed)
        self._say_ready(player)

    def _apply(self, player: Player, closed: Closed) -> None:
        assert player.round is not None
        player.fingerprint = applied(player.fingerprint, closed.closing)
        player.round += 1
        player.work = None if player.work is None or player.work.round < player.round else player.work
        self.post.append(
            Fingerprinted(client=player.key, round=closed.closing.round, fingerprint=player.fingerprint)
        )

    def _say_ready(self, player: Player) -> None:
        assert player.round is not None
        self.post.append(Ready(client=player.key, round=player.round))

    def _snapshot(self, by: str, number: int, fingerprint: str) -> SnapshotStored:
        blob = BlobRef(blob=f"s{number}", size_bytes=1)
        return SnapshotStored(by=by, snapshot=Snapshot(round=number, blob=blob, fingerprint=fingerprint))

    def do_work(self, player: Player, *, fails: bool = False) -> None:
        work, player.work = player.work, None
        assert work is not None
        if fails:
            self.post.append(WorkFailed(client=player.key, assignment=work.id, reason="out of memory"))
            return
        commit = f"h{work.id}"
        opened = Contribution(
            assignment=work.id,
            round=work.round,
            client=player.key,
            commit=commit,
            update=BlobRef(blob=f"u{work.id}", size_bytes=1),
            claims=Claims(norm=1.0, samples=10**9, work_ms=1),
        )
        self.post.append(Committed(client=player.key, round=work.round, assignment=work.id, commit=commit))
        self.post.append(Contributed(contribution=opened))

    def aggregate(self, *, accepts: bool = True) -> None:
        match self.aggregator.pop(0):
            case Merge() as merge:
                reason = "" if accepts else "not finite"
                self.append(
                    Verdict(
                        by=AGGREGATOR,
                        round=merge.round,
                        assignment=merge.assignment,
                        accepted=accepts,
                        reason=reason,
                    )
                )
            case Advance() as advance:
                if advance.closing.round == self.state.closed_rounds:
                    self.public = applied(self.public, advance.closing)
                    change = BlobRef(blob=f"c{advance.closing.round}", size_bytes=1)
                    self.append(Advanced(round=advance.closing.round, change=change, fingerprint=self.public))
            case TakeSnapshot():
                self.append(self._snapshot(AGGREGATOR, self.state.closed_rounds, self.public))

    def evaluate(self) -> None:
        evaluate = self.evaluator.pop(0)
        assert isinstance(evaluate, Evaluate)
        number = evaluate.snapshot.round
        self.append(Evaluated(round=number, loss=1.0 / (1 + number), samples=5))
        if evaluate.checkpoint:
            self.append(Checkpointed(round=number, path="here"))

    # ------------------------------------------------------------------------------- what must hold
    def check(self) -> None:
        self._check_data()
        self._check_rounds()
        assert self.state.phase == "waiting" or self.state.reason, "a phase is explained"
        deadline = next_deadline(self.state)
        assert deadline is None or deadline > self.state.now_ms, "what is due has been done"
        assert self.published == list(range(self.state.closed_rounds)), "one closing per round, in order"

    def _check_data(self) -> None:
        assigned: set[str] = set()
        pending: set[str] = set()
        for ledger in (*self.state.older_data, self.state.data):
            assert sum(balance(ledger).values()) == ledger.total, "nothing is lost, nothing done twice"
            places = [p for parts in (*ledger.assigned.values(), *ledger.pending.values()) for p in parts]
            taken = sorted((part.start, part.stop) for part in (*ledger.free, *places))
            assert all(one[1] <= two[0] for one, two in pairwise(taken)), "disjoint"
            assigned |= set(ledger.assigned)
            pending |= set(ledger.pending)
        entries = [e for round_ in self.state.rounds.values() for e in round_.entries.values()]
        closing = {r.number for r in self.state.rounds.values() if r.closing is not None}
        working = {e.assignment.id for e in entries if e.status in ("assigned", "committed")}
        stored = {
            e.assignment.id
            for e in entries
            if e.status in ("opened", "agreed") and e.assignment.round not in closing
        }
        assert (assigned, pending) == (working, stored), "the books agree with the rounds"

    def _check_rounds(self) -> None:
        for round_ in self.state.rounds.values():
            active = [
                e.assignment.client
                for e in round_.entries.values()
                if e.status in ("assigned", "committed", "opened", "agreed")
            ]
            assert len(active) == len(set(active)), "nobody has two pieces of work in a round"
            agreed = {i for i, e in round_.entries.items() if e.status == "agreed"}
            assert set(round_.agreed) == agreed
            if round_.closing is not None:
                self.note_closing(round_.closing)
                assert tuple(c.assignment for c in round_.closing.counted) == round_.agreed
                continue
            waited_for = [
                e
                for e in round_.entries.values()
                if e.status == "opened"
                or (
                    e.status in ("assigned", "committed")
                    and is_present(self.state.clients[e.assignment.client])
                )
            ]
            if round_.agreed and not waited_for and present_clients(self.state):
                raise AssertionError("a round is open although nobody who is there has anything left to do")
            for identifier in round_.agreed if self.mesh else ():
                entry = round_.entries[identifier]
                assert "server" in entry.witnesses
        for closing in self.closings.values():
            for counted in closing.counted:
                assert counted.weight == self.given[counted.assignment].weight, "weight is the assignment's"
                assert counted.client == self.given[counted.assignment].client
            ids = [entry.assignment for entry in (*closing.counted, *closing.uncounted)]
            assert sorted(ids) == sorted(i for i, a in self.given.items() if a.round == closing.round)

    # ------------------------------------------------------------------------------------ good times
    def behave(self) -> None:
        """Everybody is there and does what there is to do; time passes only when nothing else happens."""
        for player in self.players.values():
            client = self.state.clients.get(player.key)
            if player.alive and client is not None and client.suspected:
                self.append(Recovered(client=player.key))
        for _ in range(3000):
            if self.state.phase == "finished":
                return
            if self.state.phase == "paused":
                self.append(ResumeAsked())
            elif self.post:
                self.append(self.post.pop(0))
            elif self.aggregator:
                self.aggregate()
            elif self.evaluator:
                self.evaluate()
            else:
                self._let_players_act()
        raise AssertionError(f"the run hangs in {self.state.phase}: {self.state.reason}")

    def _let_players_act(self) -> None:
        for player in self.players.values():
            client = self.state.clients.get(player.key)
            if player.inbox:
                return self.look(player)
            if player.work is not None:
                return self.do_work(player)
            if client is not None and client.status == "kicked":
                continue
            if not player.alive:
                if client is not None and is_present(client):
                    self.append(Suspected(client=player.key))
                return self.sign_in(player, new=True)
        deadline = next_deadline(self.state)
        assert deadline is not None, f"nothing will ever happen again in {self.state.phase}"
        self.now_ms = max(self.now_ms, deadline)
        self.append(ClockPassed())
        return None


# ------------------------------------------------------------------------------------------ chaos
def goes_on(world: World, n: int) -> None:
    """Some things that are due anyway, in any order; now and then work fails or an update is refused."""
    order = Random(n)
    for _ in range(2 + n % 16):
        due: list[Callable[[], object]] = [
            *[lambda p=p: world.look(p) for p in world.players.values() if p.alive and p.inbox],
            *[
                lambda p=p: world.do_work(p, fails=order.random() < 0.08)
                for p in world.players.values()
                if p.alive and p.work is not None
            ],
            *[lambda at=at: world.append(world.post.pop(at)) for at in range(len(world.post))],
        ]
        due += [lambda: world.aggregate(accepts=order.random() < 0.9)] if world.aggregator else []
        due += [world.evaluate] if world.evaluator else []
        if due:
            world.now_ms += order.choice((0, 1, 100, 2_000))
            order.choice(due)()


def one_of(world: World, n: int) -> Player:
    return world.players[KEYS[n % len(KEYS)]]


def signs_in(world: World, n: int) -> None:
    player = one_of(world, n)
    if not player.alive or n % 5 == 0:
        world.sign_in(player, new=not player.alive)


def fails(world: World, n: int) -> None:
    player = one_of(world, n)
    if player.alive and player.work is not None:
        world.do_work(player, fails=True)


def dies(world: World, n: int) -> None:
    player = one_of(world, n)
    player.alive, player.work = False, None
    player.inbox.clear()
    if n % 8 < 6:
        world.append(Suspected(client=player.key))


def is_suspected(world: World, n: int) -> None:
    world.append(Suspected(client=KEYS[n % 4]))


def is_heard_again(world: World, n: int) -> None:
    if one_of(world, n).alive:
        world.append(Recovered(client=KEYS[n % 4]))


def goes(world: World, n: int) -> None:
    if n % 3 == 0:
        one_of(world, n).alive = False
        world.append(Left(client=KEYS[n % 4], how="left"))
    else:
        world.append(Left(client=KEYS[n % 4], how="lost"))


def is_kicked(world: World, n: int) -> None:
    if n % 4 == 0 and world.state.closed_rounds:
        world.append(Left(client="d", how="kicked"))


def drifts(world: World, n: int) -> None:
    """Its public is another one than everybody's: bits have flipped."""
    player = one_of(world, n)
    if player.round:
        player.fingerprint = f"wrong{n % 2}"


def post_comes_twice(world: World, n: int) -> None:
    if world.post:
        world.append(world.post[n % len(world.post)])


def something_old_comes_again(world: World, n: int) -> None:
    event = world.records[n % len(world.records)].event
    if not isinstance(event, (ServerStarted, Left, PauseAsked, Joined)):
        world.append(event)


def aggregator_restarts(world: World, n: int) -> None:
    world.aggregator = list(situation(world.state, AGGREGATOR))
    merges = [body.assignment for body in world.aggregator if isinstance(body, Merge)]
    agreed = [identifier for round_ in world.state.rounds.values() for identifier in round_.agreed]
    assert world.mesh or merges[: len(agreed)] == agreed, "what was accepted comes first, in its order"
    if n % 2:
        world.evaluator = list(situation(world.state, EVALUATOR))


def connection_is_renewed(world: World, n: int) -> None:
    player = one_of(world, n)
    client = world.state.clients.get(player.key)
    if player.alive and client is not None and client.boot == f"{player.boot}":
        world.append(Recovered(client=player.key))
        player.inbox = list(situation(world.state, player.key))


def time_passes(world: World, n: int) -> None:
    world.now_ms += (-5_000, 1, 500, 3_000, 8_000, 40_000, 10_000_000)[n % 7]
    world.append(ClockPassed())


def a_deadline_passes(world: World, n: int) -> None:
    deadline = next_deadline(world.state)
    if deadline is not None:
        world.now_ms = max(world.now_ms, deadline - n % 2)
        world.append(ClockPassed())


def server_restarts(world: World, n: int) -> None:
    world.restart((0, 2_000, 5_000_000)[n % 3])


def pauses(world: World, n: int) -> None:
    if n % 3 == 0:
        world.append(PauseAsked(reason="lunch"))


def resumes(world: World, n: int) -> None:
    for _ in range(1 + n % 2):
        world.append(ResumeAsked())


CHAOS = (
    signs_in,
    fails,
    dies,
    is_suspected,
    is_heard_again,
    goes,
    is_kicked,
    drifts,
    post_comes_twice,
    something_old_comes_again,
    aggregator_restarts,
    connection_is_renewed,
    time_passes,
    a_deadline_passes,
    server_restarts,
    pauses,
    resumes,
)
MUCH = (goes_on,) * 14 + (signs_in,) * 3 + CHAOS
steps = st.lists(st.tuples(st.sampled_from(MUCH), st.integers(0, 1000)), min_size=20, max_size=80)


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_chaos(plan: Callable[..., Plan], topology: str) -> None:
    made = plan_for(plan, topology)

    @settings(
        max_examples=EXAMPLES or 150,
        phases=(Phase.generate,) if EXAMPLES else (Phase.generate, Phase.shrink),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(steps)
    def run(chosen: list[tuple[Callable[[World, int], None], int]]) -> None:
        world = World(made)
        for key in KEYS[:2]:
            world.sign_in(world.players[key], new=True)
        for step, n in chosen:
            step(world, n)
        world.behave()
        assert world.state.closed_rounds == world.state.plan.rounds.total
        assert world.state.checkpointed == world.state.plan.rounds.total
        assert replayed(world, 7) == (world.state, world.effects), "in portions"
        assert world.state == load_state(dump_state(world.state))

    run()


def replayed(world: World, most: int) -> tuple[Any, list[NumberedEffect]]:
    """The log again, up to `most` events of the same time in one tick."""
    state, effects = world.initial, []
    at = 0
    while at < len(world.records):
        now_ms = world.records[at].now_ms
        portion = [r.event for r in world.records[at : at + most] if r.now_ms == now_ms]
        together = [r for r in world.records[at : at + len(portion)] if r.now_ms == now_ms]
        done = tick(state, [r.event for r in together], now_ms, SEED)
        state = done.state
        effects += done.effects
        at += len(together)
    return state, effects


def plan_for(make: Callable[..., Plan], topology: str) -> Plan:
    return make(
        topology=topology,
        local={"steps": 3, "batch_size": 2},
        membership={"min_clients": 2},
        merge={"weight": "samples"},
        rounds={
            "total": 6,
            "quorum": 2,
            "max_failed": 2,
            "first_deadline_s": 60.0,
            "snapshot_every": 2,
            "warmup_s": 20.0,
        },
    )


def assembled(plan: Plan) -> World:
    """Everybody has joined and has work of round 0."""
    world = World(plan)
    for key in KEYS:
        world.sign_in(world.players[key], new=True)
    while world.post or any(player.inbox for player in world.players.values()):
        if world.post:
            world.append(world.post.pop(0))
        else:
            world.look(next(player for player in world.players.values() if player.inbox))
    return world


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_a_quiet_run_finishes_without_a_deadline(plan: Callable[..., Plan], topology: str) -> None:
    world = assembled(plan_for(plan, topology))
    world.behave()
    counted = [len(closing.counted) for closing in world.closings.values()]
    assert counted == [4] * 6
    assert all(not isinstance(record.event, ClockPassed) for record in world.records)


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_a_dead_client_costs_no_timeout(plan: Callable[..., Plan], topology: str) -> None:
    """It dies in the middle of its work, is suspected, and stays away: the others go on at once."""
    world = assembled(plan_for(plan, topology))
    dead = world.players.pop("b")
    assert dead.work is not None
    world.append(Suspected(client="b"))
    world.behave()
    assert world.now_ms == 0
    assert all(not isinstance(record.event, ClockPassed) for record in world.records)
    assert [len(closing.counted) for closing in world.closings.values()] == [3] * 6


def test_witnesses_of_every_counted_update(plan: Callable[..., Plan]) -> None:
    """In a quiet mesh of four, every counted update had its quorum of the four who could judge it."""
    world = assembled(plan_for(plan, "mesh"))
    world.behave()
    verdicts: dict[str, set[str]] = {}
    for record in world.records:
        if isinstance(record.event, Verdict) and record.event.accepted:
            verdicts.setdefault(record.event.assignment, {"server"}).add(record.event.by)
    for closing in world.closings.values():
        for counted in closing.counted:
            assert len(verdicts[counted.assignment] - {counted.client}) >= quorum(4)
