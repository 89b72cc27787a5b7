from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.effects import Abandon, Evaluate, PhaseChanged, Work
from manyhands.coordination.events import (
    Checkpointed,
    Evaluated,
    Failed,
    Joined,
    Left,
    PauseAsked,
    Ready,
    ResumeAsked,
    ServerStarted,
    SnapshotStored,
    Suspected,
)
from manyhands.coordination.membership import may_join
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, EVERYONE, BlobRef, Snapshot

MakeDesk = Callable[..., Any]


def test_waiting_then_warming_up_then_training(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 2})
    table.join("a")
    assert table.state.phase == "waiting"
    table.join("b")
    assert table.state.phase == "warming_up"
    assert "of 2 clients are here" in table.sent(PhaseChanged, EVERYONE)[-1].reason
    table.ready("a")
    assert table.state.phase == "warming_up"
    table.ready("b")
    assert table.state.phase == "training"
    assert len(table.sent(Work)) == 2


def test_warming_up_waits_for_all_who_joined_but_not_for_ever(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 1}, rounds={"warmup_s": 60.0})
    table.join("a", "b")
    table.ready("a")
    assert table.state.phase == "warming_up"
    table.after(59_999)
    assert table.state.phase == "warming_up"
    table.after(1)
    assert table.state.phase == "training"
    assert [work.assignment.client for work in table.sent(Work)] == ["a"]


def test_after_the_warm_up_the_first_who_are_enough_start(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 2}, rounds={"warmup_s": 60.0})
    table.join("a", "b", "c")
    table.after(60_000)
    assert table.state.phase == "warming_up"
    table.ready("a", "b")
    assert table.state.phase == "training"


def test_a_suspected_client_is_not_waited_for_in_the_warm_up(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 1})
    table.join("a", "b")
    table.ready("a")
    table.do(Suspected(client="b"))
    assert table.state.phase == "training"


def test_too_few_again_in_the_warm_up(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 2})
    table.join("a", "b")
    table.do(Left(client="a", how="left"))
    assert table.state.phase == "waiting"


def test_fewer_than_needed_open_no_round(desk: MakeDesk) -> None:
    table = desk(2, membership={"min_clients": 2}, rounds={"total": 5})
    table.do(Left(client="b", how="lost"))
    assert table.state.phase == "training", "the open round still closes"
    table.send("a")
    table.accept("a")
    table.advance()
    assert table.state.phase == "waiting"
    assert "1 of 2 clients are here" in table.sent(PhaseChanged, EVERYONE)[-1].reason
    table.ready("a")
    assert table.state.rounds == {}
    table.join("b", boot="2", has_round=1)
    assert table.state.phase == "training"
    table.ready("b")
    assert table.round.number == 1


def test_the_next_round_opens_when_all_have_applied(desk: MakeDesk) -> None:
    table = desk(3)
    table.send("a", "b", "c")
    table.accept("a", "b", "c")
    table.advance()
    table.ready("a", "b")
    assert table.state.rounds == {}
    table.ready("c")
    assert len(table.round.entries) == 3


def test_one_slow_applier_does_not_stop_the_others(desk: MakeDesk) -> None:
    table = desk(3, membership={"min_clients": 1}, rounds={"total": 5})
    table.send("a", "b", "c")
    table.accept("a", "b", "c")
    table.advance()
    table.now_ms += 3_000
    table.ready("a")
    assert table.state.opening_ms == table.now_ms + 3_000, "as long again as the first one took"
    table.now_ms += 1_000
    table.ready("b")
    table.after(2_000)
    assert {e.assignment.client for e in table.round.entries.values()} == {"a", "b"}
    table.ready("c")
    table.whole_round("a", "b")
    assert table.state.rounds == {}, "c may apply this one in time"
    table.ready("c")
    assert len(table.round.entries) == 3


def test_nobody_waits_for_one_that_is_far_behind(desk: MakeDesk) -> None:
    table = desk(2, membership={"min_clients": 1}, rounds={"total": 5})
    table.send("a", "b")
    table.accept("a", "b")
    table.advance()
    table.ready("a")
    table.at_deadline()
    table.whole_round("a")
    assert {e.assignment.client for e in table.round.entries.values()} == {"a"}


def test_after_a_long_wait_the_grace_is_short(desk: MakeDesk) -> None:
    table = desk(3, membership={"min_clients": 2}, rounds={"total": 5, "lost_after_s": 30.0})
    table.send("a", "b", "c")
    table.accept("a", "b", "c")
    table.advance()
    table.now_ms += 3_600_000
    table.ready("a", "b")
    assert table.state.opening_ms == table.now_ms + 30_000


def test_pause_and_resume(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(PauseAsked(reason="maintenance"))
    assert (table.state.phase, table.state.reason) == ("paused", "maintenance")
    table.whole_round("a", "b")
    assert table.state.closed_rounds == 1, "the open round still closes"
    assert table.state.rounds == {}
    assert table.do(PauseAsked(reason="again")) == []
    table.do(ResumeAsked())
    assert (table.state.phase, table.round.number) == ("training", 1)
    assert table.do(ResumeAsked()) == []


def test_pause_while_waiting_resumes_to_waiting(desk: MakeDesk) -> None:
    table = desk(0)
    table.do(PauseAsked(reason="x"))
    table.join("a")
    assert table.state.phase == "paused"
    table.do(ResumeAsked())
    assert table.state.phase == "warming_up"


def test_the_end(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 2, "snapshot_every": 5})
    table.whole_round("a", "b")
    table.whole_round("a", "b")
    assert table.state.phase == "checkpointing"
    assert table.state.snapshot_asked is not None
    assert table.state.snapshot_asked[0] == 2


def test_finished_needs_evaluation_and_checkpoint(desk: MakeDesk) -> None:
    for order in ((0, 1), (1, 0)):
        table = desk(1, rounds={"total": 1})
        table.whole_round("a")
        snapshot = Snapshot(round=1, blob=BlobRef(blob="s", size_bytes=1), fingerprint="f1")
        table.do(SnapshotStored(by=AGGREGATOR, snapshot=snapshot))
        (evaluate,) = table.sent(Evaluate, EVALUATOR)
        assert evaluate.checkpoint
        said = (Evaluated(round=1, loss=1.0, samples=5), Checkpointed(round=1, path="p"))
        table.do(said[order[0]])
        assert table.state.phase == "checkpointing"
        table.do(said[order[1]])
        assert table.state.phase == "finished"
        assert "finished" in (may_join(table.state, "new", "1") or "")


def test_failed_is_for_good_and_stops_the_work(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(Failed(reason="the disk is full"))
    assert {abandon.assignment for abandon in table.sent(Abandon)} == {"0-0", "0-1"}
    assert table.sent(PhaseChanged, EVERYONE)[0].reason == "the disk is full"
    assert table.do(ResumeAsked()) == []
    table.send("a")
    assert table.entry("a").status == "assigned"
    assert "the disk is full" in (may_join(table.state, "new", "1") or "")
    assert table.do(Joined(client="new", boot="1")) == []


def test_a_restart_of_the_server_moves_every_deadline(desk: MakeDesk) -> None:
    table = desk(2)
    deadline = table.round.deadline_ms
    table.do(Suspected(client="a"))
    table.now_ms += 500_000
    table.do(ServerStarted(downtime_ms=500_000))
    assert table.round.deadline_ms == deadline + 500_000
    assert not table.state.clients["a"].suspected
    assert table.round.stage == "work"
    table.whole_round("a", "b")
    assert table.state.round_ms == (), "work during the downtime measures nothing"
    assert table.round.number == 1


def test_a_restart_moves_warm_up_and_opening(desk: MakeDesk) -> None:
    table = desk(0, membership={"min_clients": 1}, rounds={"warmup_s": 60.0})
    table.join("a", "b")
    table.ready("a")
    table.now_ms += 100_000
    table.do(ServerStarted(downtime_ms=100_000))
    assert table.state.phase == "warming_up"
    table.after(60_000)
    assert table.state.phase == "training"


def test_a_restart_between_rounds_does_not_stretch_the_grace(desk: MakeDesk) -> None:
    table = desk(3, membership={"min_clients": 1}, rounds={"total": 5})
    table.send("a", "b", "c")
    table.accept("a", "b", "c")
    table.advance()
    table.now_ms += 25_000
    table.do(ServerStarted(downtime_ms=25_000))
    table.do(Ready(client="a", round=1))
    assert table.state.opening_ms == table.now_ms + 2_000
