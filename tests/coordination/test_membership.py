from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.effects import CatchUp, Dismissed, PhaseChanged, Work
from manyhands.coordination.events import Joined, Left, Ready, Recovered, Suspected
from manyhands.coordination.membership import may_join

MakeDesk = Callable[..., Any]
KEY = "ab" * 32


def test_one_session_per_key(desk: MakeDesk) -> None:
    table = desk(2)
    assert may_join(table.state, "a", "a1") is None, "the same process reconnects"
    assert "another process" in (may_join(table.state, "a", "a2") or "")
    table.do(Suspected(client="a"))
    assert may_join(table.state, "a", "a2") is None
    table.do(Left(client="a", how="lost"))
    assert may_join(table.state, "a", "a2") is None


def test_a_refused_newcomer_does_not_disturb_the_living(desk: MakeDesk) -> None:
    table = desk(2)
    before = table.state.clients
    assert table.do(Joined(client="a", boot="a2")) == []
    assert table.state.clients is before


def test_allow_list(desk: MakeDesk) -> None:
    table = desk(0, membership={"kind": "allow_list", "allow": [KEY], "min_clients": 1})
    assert may_join(table.state, KEY, "1") is None
    assert "allow-list" in (may_join(table.state, "cd" * 32, "1") or "")
    table.do(Joined(client="cd" * 32, boot="1"))
    assert table.state.clients == {}


def test_a_full_run(desk: MakeDesk) -> None:
    table = desk(2, membership={"min_clients": 1, "max_clients": 2})
    assert "full" in (may_join(table.state, "c", "1") or "")
    table.do(Suspected(client="a"))
    assert may_join(table.state, "a", "a2") is None, "its own place is still its own"
    table.do(Left(client="b", how="left"))
    assert may_join(table.state, "c", "1") is None


def test_participants_names_are_no_keys(desk: MakeDesk) -> None:
    for name in ("aggregator", "evaluator", "everyone", "server"):
        assert may_join(desk(0).state, name, "1") is not None


def test_a_newcomer_is_told_where_to_start(desk: MakeDesk) -> None:
    table = desk(1)
    table.join("n")
    (catch_up,) = table.sent(CatchUp, "n")
    assert (catch_up.snapshot, catch_up.closed, catch_up.round) == (table.state.snapshots[0], (), 0)
    assert table.sent(PhaseChanged, "n")[0].phase == "training"
    assert table.state.clients["n"].status == "catching_up"


def test_a_late_joiner_works_from_the_next_boundary(desk: MakeDesk) -> None:
    table = desk(2)
    table.join("n")
    table.ready("n")
    assert table.sent(Work) == []
    table.send("a", "b")
    table.accept("a", "b")
    table.advance()
    table.ready("a", "b", "n")
    assert table.work("n").round == 1


def test_the_same_process_keeps_its_work(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(Suspected(client="a"), Joined(client="a", boot="a1", has_round=0))
    assert table.entry("a").status == "assigned"
    assert not table.state.clients["a"].suspected
    assert table.state.clients["a"].status == "ready"
    assert table.sent(CatchUp) == [], "it is not to drop the work that it is at"
    assert table.sent(Work, "a")[0].assignment == table.work("a"), "it is told everything again"
    table.do(Joined(client="a", boot="a1", has_round=None))
    assert table.sent(CatchUp, "a")[0].snapshot is not None, "it has lost public and asks for it"
    assert table.state.clients["a"].status == "catching_up"
    assert table.entry("a").status == "assigned"


def test_coming_back_is_counted_and_starts_from_where_it_is(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 5, "snapshot_every": 5})
    table.whole_round("a", "b")
    table.do(Left(client="b", how="lost"), Joined(client="b", boot="b2", has_round=0))
    (catch_up,) = table.sent(CatchUp, "b")
    assert catch_up.snapshot is None
    assert [closed.closing.round for closed in catch_up.closed] == [0]
    client = table.state.clients["b"]
    assert (client.boot, client.rejoined, client.status) == ("b2", 1, "catching_up")


def test_ready_never_goes_back_and_never_ahead(desk: MakeDesk) -> None:
    table = desk(1)
    table.whole_round("a")
    table.do(Ready(client="a", round=0))
    assert table.state.clients["a"].round == 1
    table.do(Ready(client="a", round=7), Ready(client="a", round=-1), Ready(client="nobody", round=0))
    assert table.state.clients["a"].round == 1


def test_lost_and_left(desk: MakeDesk) -> None:
    table = desk(3)
    table.do(Left(client="a", how="lost"))
    assert not table.sent(Dismissed, "a")[0].final
    assert table.entry("a").status == "given_back"
    assert table.do(Left(client="a", how="lost")) == []
    table.do(Left(client="b", how="left", reason="bye"))
    assert table.sent(Dismissed) == []
    assert "bye" in table.entry("b").reason
    assert table.state.clients["b"].status == "left"


def test_recovered_needs_a_session(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(Suspected(client="a"))
    table.do(Recovered(client="a"))
    assert not table.state.clients["a"].suspected
    table.do(Left(client="a", how="lost"))
    table.do(Recovered(client="a"))
    assert table.state.clients["a"].status == "lost"
    assert not table.sent(Dismissed, "a")[0].final


def test_kicked_is_for_good(desk: MakeDesk) -> None:
    table = desk(2)
    table.do(Left(client="a", how="kicked", reason="sends noise"))
    (dismissed,) = table.sent(Dismissed, "a")
    assert dismissed.final
    assert "sends noise" in dismissed.reason
    assert table.entry("a").status == "given_back"
    assert may_join(table.state, "a", "a9") is not None
    table.do(Joined(client="a", boot="a9"))
    assert table.state.clients["a"].status == "kicked"
    assert table.sent(Dismissed, "a")[0].final
    table.do(Left(client="unseen", how="kicked"))
    assert may_join(table.state, "unseen", "1") is not None
