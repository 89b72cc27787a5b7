from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.effects import (
    Advance,
    CatchUp,
    Dismissed,
    Evaluate,
    Merge,
    PhaseChanged,
    Reveal,
    TakeSnapshot,
    Work,
)
from manyhands.coordination.events import Evaluated, Left, PauseAsked, ServerStarted, Verdict
from manyhands.coordination.situations import situation
from manyhands.coordination.types import AGGREGATOR, EVALUATOR

MakeDesk = Callable[..., Any]


def kinds(bodies: tuple[object, ...]) -> list[type]:
    return [type(body) for body in bodies]


def test_an_aggregator_repeats_what_it_accepted_in_its_order(desk: MakeDesk) -> None:
    table = desk(4)
    table.send("a", "b", "c")
    table.accept("c")
    table.accept("a")
    told = situation(table.state, AGGREGATOR)
    assert [body.client for body in told if isinstance(body, Merge)] == ["c", "a", "b"]
    assert told[0].weight == table.work("c").weight


def test_an_aggregator_is_told_of_a_closing_that_it_has_not_applied(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 9, "snapshot_every": 1})
    table.send("a", "b")
    table.accept("b", "a")
    told = situation(table.state, AGGREGATOR)
    assert kinds(told) == [Merge, Merge, Advance]
    assert [body.client for body in told[:2]] == ["b", "a"]
    table.advance()
    assert situation(table.state, AGGREGATOR) == (TakeSnapshot(round=1),)


def test_the_evaluator(desk: MakeDesk) -> None:
    table = desk(1)
    assert situation(table.state, EVALUATOR) == (
        Evaluate(snapshot=table.initial.snapshots[0], checkpoint=False),
    )
    table.do(Evaluated(round=0, loss=1.0, samples=1))
    assert situation(table.state, EVALUATOR) == ()


def test_a_client_gets_its_work_with_the_deadline_in_force(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(ServerStarted(downtime_ms=7_000))
    told = situation(table.state, "a")
    assert kinds(told) == [PhaseChanged, Work]
    assert told[1].assignment == table.work("a")
    assert told[1].terms.deadline_ms == table.round.deadline_ms
    table.send("a")
    assert kinds(situation(table.state, "a")) == [PhaseChanged]


def test_a_client_that_missed_a_closing_gets_it(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 9})
    table.send("a", "b")
    table.accept("a", "b")
    table.advance()
    told = situation(table.state, "a")
    assert kinds(told) == [PhaseChanged, CatchUp]
    assert told[1].snapshot is None
    assert [closed.closing.round for closed in told[1].closed] == [0]


def test_paused_catching_up_gone_and_unknown(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(PauseAsked(reason="maintenance"))
    assert situation(table.state, "a")[0] == PhaseChanged(phase="paused", reason="maintenance")
    table.join("n")
    assert kinds(situation(table.state, "n")) == [PhaseChanged, CatchUp]
    table.do(Left(client="b", how="kicked"))
    (dismissed,) = situation(table.state, "b")
    assert isinstance(dismissed, Dismissed)
    assert dismissed.final
    assert situation(table.state, "nobody") == ()


def test_a_witness_gets_what_it_has_still_to_judge(desk: MakeDesk) -> None:
    table = desk(5, topology="mesh")
    table.send(*"abcde")
    table.do(Verdict(by="a", round=0, assignment="0-1", accepted=True))
    (reveal,) = [body for body in situation(table.state, "a") if isinstance(body, Reveal)]
    assert [c.client for c in reveal.contributions] == ["c", "d", "e"]


def test_a_mesh_client_is_reminded_of_its_snapshot(desk: MakeDesk) -> None:
    table = desk(1, topology="mesh", rounds={"total": 9, "snapshot_every": 1})
    table.send("a")
    assert situation(table.state, "a")[-1] == TakeSnapshot(round=1)
    assert situation(table.state, AGGREGATOR) == ()
