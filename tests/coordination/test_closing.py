from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.data_ranges import balance
from manyhands.coordination.effects import Abandon, Advance, Closed, PhaseChanged
from manyhands.coordination.events import (
    Advanced,
    Joined,
    Left,
    Recovered,
    ResumeAsked,
    Suspected,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.types import AGGREGATOR, EVERYONE, BlobRef

MakeDesk = Callable[..., Any]


def test_a_round_closes_when_everybody_is_agreed(desk: MakeDesk) -> None:
    table = desk(3)
    table.send("a", "b", "c")
    table.accept("c", "a")
    assert table.round.stage == "work"
    table.accept("b")
    (advance,) = table.sent(Advance, AGGREGATOR)
    assert [counted.client for counted in advance.closing.counted] == ["c", "a", "b"], "order of the verdicts"
    assert table.sent(Closed) == []
    table.advance()
    (closed,) = table.sent(Closed, EVERYONE)
    assert closed.closing == advance.closing
    assert (closed.change.blob, closed.fingerprint) == ("change0", "f1")
    assert table.state.closed_rounds == 1
    assert balance(table.state.data) == {"free": 976, "assigned": 0, "pending": 0, "counted": 24}


def test_one_dead_client_costs_the_others_nothing(desk: MakeDesk) -> None:
    table = desk(3)
    table.send("a", "b")
    table.accept("a", "b")
    assert table.round.stage == "work"
    table.do(Suspected(client="c"))
    assert table.round.stage == "close"
    assert [u.client for u in table.round.closing.uncounted] == ["c"]
    assert balance(table.state.data)["free"] == 984
    assert table.sent(Abandon, "c")[0].assignment == "0-2"


def test_a_suspected_client_counts_when_it_is_in_time(desk: MakeDesk) -> None:
    table = desk(3)
    table.do(Suspected(client="c"))
    table.send("c")
    table.accept("c")
    assert table.round.stage == "work", "the others are still waited for"
    table.send("a", "b")
    table.accept("a", "b")
    table.advance()
    assert [counted.client for counted in table.closings()[0].closing.counted] == ["c", "a", "b"]


def test_a_stored_update_is_waited_for_even_when_its_client_is_gone(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a", "b")
    table.do(Suspected(client="b"))
    table.accept("a")
    assert table.round.stage == "work"


def test_everybody_unheard_for_a_moment_does_not_close_a_round(desk: MakeDesk) -> None:
    table = desk(3)
    table.send("a")
    table.accept("a")
    table.do(Suspected(client="a"), Suspected(client="b"), Suspected(client="c"))
    assert table.round.stage == "work"
    table.do(Recovered(client="b"))
    assert table.round.stage == "work"
    table.send("b")
    table.accept("b")
    assert table.round.stage == "close"


def test_alone_and_suspected_keeps_its_work(desk: MakeDesk) -> None:
    table = desk(1)
    table.do(Suspected(client="a"))
    assert table.entry("a").status == "assigned"
    table.do(Recovered(client="a"))
    table.whole_round("a")
    assert table.state.closed_rounds == 1


def test_the_deadline_closes_with_a_quorum(desk: MakeDesk) -> None:
    table = desk(3, rounds={"quorum": 2})
    table.send("a", "b")
    table.accept("a", "b")
    table.after(99_999)
    assert table.round.stage == "work"
    table.after(1)
    assert [c.client for c in table.round.closing.counted] == ["a", "b"]
    assert "deadline" in table.round.closing.uncounted[0].reason
    assert table.state.clients["c"].step_us == 100_000_000 // 4, "late: at least so slow"


def test_a_deadline_without_a_quorum_moves_while_somebody_works(desk: MakeDesk) -> None:
    table = desk(3, rounds={"quorum": 2})
    table.send("a")
    table.accept("a")
    table.at_deadline()
    assert table.round.stage == "work"
    assert table.round.deadline_ms == table.now_ms + 50_000, "half as long again"
    table.send("c")
    table.accept("c")
    table.at_deadline()
    assert [c.client for c in table.round.closing.counted] == ["a", "c"]


def test_without_a_quorum_at_the_last_deadline_nothing_counts(desk: MakeDesk) -> None:
    table = desk(3, rounds={"quorum": 2, "deadline_ceiling_s": 160.0})
    table.send("a")
    table.accept("a")
    table.at_deadline()
    table.at_deadline()
    assert table.round.stage == "work"
    table.at_deadline()
    (closed,) = table.closings()
    assert closed.closing.counted == ()
    assert (closed.change, closed.fingerprint) == (None, "f0")
    assert "no quorum" in next(u.reason for u in closed.closing.uncounted if u.client == "a")
    assert table.sent(Advance) == []
    assert balance(table.state.data)["free"] == 1000
    assert (table.state.closed_rounds, table.state.failed_in_a_row, table.state.outer_steps) == (1, 1, 0)


def test_an_update_that_waits_for_its_verdict_moves_the_deadline_once(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a", "b")
    table.accept("a")
    table.at_deadline()
    assert table.round.stage == "work"
    assert table.round.deadline_ms == table.now_ms + 50_000
    table.at_deadline()
    assert [c.client for c in table.round.closing.counted] == ["a"]
    assert "no verdict of the aggregator" in table.round.closing.uncounted[0].reason


def test_a_closing_is_made_once(desk: MakeDesk) -> None:
    table = desk(3)
    table.send("a", "b", "c")
    table.accept("a", "b")
    table.at_deadline()
    table.at_deadline()
    closing = table.round.closing
    table.do(Verdict(by=AGGREGATOR, round=0, assignment="0-2", accepted=True))
    table.do(Left(client="a", how="lost"), Joined(client="a", boot="a2"))
    assert table.round.closing is closing
    table.advance()
    assert table.closings()[0].closing is closing


def test_advanced_counts_once_and_only_for_a_closing(desk: MakeDesk) -> None:
    table = desk(2)
    early = Advanced(round=0, change=BlobRef(blob="x", size_bytes=1), fingerprint="x")
    assert table.do(early) == []
    table.send("a", "b")
    table.accept("a", "b")
    table.advance()
    assert table.do(early) == []
    assert table.state.history[0].fingerprint == "f1"


def test_only_the_aggregator_judges_in_a_star(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a")
    table.do(Verdict(by="b", round=0, assignment=table.work("a").id, accepted=True))
    assert table.entry("a").status == "opened"
    table.do(Verdict(by=AGGREGATOR, round=0, assignment=table.work("b").id, accepted=True))
    assert table.entry("b").status == "assigned", "nothing is accepted that was not sent"


def test_a_refused_update_is_over_and_its_range_free(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a", "b")
    refused = Verdict(by=AGGREGATOR, round=0, assignment="0-0", accepted=False, reason="not finite")
    table.do(refused)
    table.accept("b")
    assert table.round.closing.uncounted[0].reason == "not finite"
    assert balance(table.state.data)["counted"] == 8


def test_a_round_in_which_all_failed_closes_at_once(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(*[WorkFailed(client=k, assignment=table.work(k).id, reason="no memory") for k in "ab"])
    (closed,) = table.sent(Closed)
    assert closed.closing.counted == ()
    assert table.state.failed_in_a_row == 1


def test_too_many_failed_rounds_pause_the_run_and_say_why(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 9, "max_failed": 2})
    for _ in range(2):
        table.ready("a", "b")
        table.do(*[WorkFailed(client=k, assignment=table.work(k).id, reason="no memory") for k in "ab"])
    assert table.state.phase == "paused"
    assert "no memory" in table.sent(PhaseChanged, EVERYONE)[-1].reason
    table.ready("a", "b")
    assert table.state.rounds == {}
    table.do(ResumeAsked())
    assert (table.state.phase, table.round.number) == ("training", 2)
    table.whole_round("a", "b")
    assert table.state.failed_in_a_row == 0


def test_a_late_client_gets_less_the_next_time(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 5}, local={"steps": 8})
    table.now_ms += 8_000
    table.send("a")
    table.accept("a")
    table.at_deadline()
    table.advance()
    table.ready("a", "b")
    assert (table.work("a").steps, table.work("b").steps) == (8, 2)


def test_statistics_of_clients(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a")
    table.accept("a")
    table.do(Left(client="b", how="lost"))
    clients = table.state.clients
    assert (clients["a"].counted, clients["a"].uncounted) == (1, 0)
    assert (clients["b"].counted, clients["b"].uncounted) == (0, 1)
