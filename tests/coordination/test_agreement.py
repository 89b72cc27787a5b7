from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from manyhands.coordination.agreement import quorum
from manyhands.coordination.effects import Abandon, Closed, Reveal
from manyhands.coordination.events import Left, Suspected, Verdict
from manyhands.coordination.types import EVERYONE

MakeDesk = Callable[..., Any]


def verdict(by: str, assignment: str, accepted: bool = True) -> Verdict:
    reason = "" if accepted else "not finite"
    return Verdict(by=by, round=0, assignment=assignment, accepted=accepted, reason=reason)


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 1), (2, 2), (3, 2), (4, 2), (5, 3), (6, 4), (9, 6), (32, 21)]
)
def test_quorum(n: int, expected: int) -> None:
    assert quorum(n) == expected


def test_nothing_is_revealed_before_commits_close(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a", "b")
    assert table.sent(Reveal) == []
    table.commit("c")
    (reveal,) = table.sent(Reveal, EVERYONE)
    assert [c.client for c in reveal.contributions] == ["a", "b"]
    assert (table.round.stage, table.round.commits_closed) == ("agree", True)
    table.send("c")
    assert [c.client for c in table.sent(Reveal)[0].contributions] == ["c"], "the rest as it comes"


def test_after_commits_close_nothing_new_is_taken(desk: MakeDesk, contribute: Any) -> None:
    table = desk(3, topology="mesh")
    work = table.work("c")
    table.send("a", "b")
    table.at_deadline()
    assert table.round.commits_closed
    assert table.sent(Abandon, "c")[0].assignment == work.id
    table.do(contribute(work))
    assert table.entry("c").status == "given_back"
    assert table.sent(Abandon, "c")


def test_commits_do_not_wait_for_a_suspected_client(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.commit("a", "b")
    table.do(Suspected(client="c"))
    assert table.round.commits_closed


def test_commits_stay_open_while_nobody_is_heard(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.commit("a")
    table.do(*[Suspected(client=key) for key in "abc"])
    assert not table.round.commits_closed


def test_witnesses_agree_and_the_round_closes(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a", "b", "c")
    table.do(verdict("b", "0-0"))
    assert table.entry("a").status == "agreed", "server and one of two others: 2 of 3"
    table.do(verdict("a", "0-1"), verdict("a", "0-2"))
    (closed,) = table.sent(Closed, EVERYONE)
    assert [c.assignment for c in closed.closing.counted] == ["0-0", "0-1", "0-2"]
    assert (closed.change, closed.fingerprint) == (None, None)


def test_the_sender_is_no_witness_of_its_own(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a", "b", "c")
    table.do(verdict("a", "0-0"))
    assert table.entry("a").status == "opened"


def test_strangers_and_newcomers_are_no_witnesses(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.join("d")
    table.send("a", "b", "c")
    table.ready("d")
    assert table.round.witnesses == ("a", "b", "c")
    table.do(verdict("d", "0-0"), verdict("nobody", "0-0"))
    assert table.entry("a").status == "opened"


def test_nobody_judges_what_is_not_revealed(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a")
    table.do(verdict("b", "0-0"))
    assert table.entry("a").status == "opened"


def test_a_quorum_of_objections_refuses(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a", "b", "c")
    table.do(verdict("b", "0-0", accepted=False))
    table.do(verdict("b", "0-0", accepted=True))
    assert table.entry("a").status == "opened", "the first verdict of a witness stands"
    table.do(verdict("c", "0-0", accepted=False))
    assert table.entry("a").status == "refused"
    assert "not finite" in table.entry("a").reason


def test_of_two_clients_one_objection_is_enough(desk: MakeDesk) -> None:
    table = desk(2, topology="mesh")
    table.send("a", "b")
    table.do(verdict("b", "0-0", accepted=False))
    assert table.entry("a").status == "refused"


def test_five_clients_need_three_of_five(desk: MakeDesk) -> None:
    table = desk(5, topology="mesh")
    table.send(*"abcde")
    table.do(verdict("b", "0-0"))
    assert table.entry("a").status == "opened"
    table.do(verdict("c", "0-0"))
    assert table.entry("a").status == "agreed"


def test_alone_the_server_is_witness_enough(desk: MakeDesk) -> None:
    table = desk(1, topology="mesh")
    table.send("a")
    assert table.state.closed_rounds == 1


def test_a_witness_that_dies_is_not_waited_for(desk: MakeDesk) -> None:
    table = desk(2, topology="mesh")
    table.send("a")
    table.commit("b")
    assert table.entry("a").status == "opened"
    table.do(Suspected(client="b"))
    assert table.closings()[0].closing.counted[0].client == "a"


def test_when_nobody_is_heard_nothing_is_agreed_unseen(desk: MakeDesk) -> None:
    table = desk(2, topology="mesh")
    table.send("a", "b")
    table.do(Suspected(client="a"))
    table.do(Suspected(client="b"))
    assert table.state.closed_rounds == 0
    assert table.entry("b").status == "agreed", "judged while b was there and a was not"
    assert table.entry("a").status == "opened"


def test_an_undecided_update_does_not_count_after_the_deadline(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a", "b", "c")
    table.do(verdict("b", "0-0"), verdict("a", "0-1"))
    table.at_deadline()
    (closed,) = table.sent(Closed)
    assert [c.client for c in closed.closing.counted] == ["a", "b"]
    assert "witnesses" in closed.closing.uncounted[0].reason


def test_a_witness_that_started_again_is_none_any_more(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh")
    table.send("a", "b", "c")
    table.do(Left(client="c", how="lost"))
    assert table.round.witnesses == ("a", "b")
    table.do(verdict("c", "0-0"))
    assert table.entry("a").status == "opened"
