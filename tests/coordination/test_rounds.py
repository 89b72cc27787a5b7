from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from manyhands.coordination.effects import Abandon, Dismissed, Merge, Work
from manyhands.coordination.events import Committed, Contributed, Joined, Left, Suspected, Verdict, WorkFailed
from manyhands.coordination.rounds import work_seed
from manyhands.coordination.types import AGGREGATOR

MakeDesk = Callable[..., Any]


def test_everybody_in_step_gets_work_with_data_of_its_own(desk: MakeDesk) -> None:
    table = desk(3)
    works = table.sent(Work)
    assert [work.assignment.client for work in works] == ["a", "b", "c"]
    assert [work.assignment.id for work in works] == ["0-0", "0-1", "0-2"]
    ranges = [work.assignment.ranges[0] for work in works]
    assert [(part.start, part.stop) for part in ranges] == [(0, 8), (8, 16), (16, 24)]
    assert {work.assignment.steps * work.assignment.batch_size for work in works} == {8}
    assert len({work.assignment.seed for work in works}) == 3


def test_terms_are_published_with_the_round(desk: MakeDesk) -> None:
    table = desk(1, schedule={"kind": "linear", "final": 0.0}, local={"steps": 4})
    table.whole_round("a")
    terms = table.sent(Work)[0].terms
    assert (terms.round, terms.first_step, len(terms.learning_rates)) == (1, 4, 4)
    assert list(terms.learning_rates) == sorted(terms.learning_rates, reverse=True)
    assert terms.deadline_ms == table.now_ms + 10_000, "measured to be fast: the floor"


def test_adam_counts_only_rounds_that_changed_public(desk: MakeDesk) -> None:
    table = desk(1, outer={"name": "adamw", "beta1": 0.5})
    assert table.round.terms.outer.bias1 == 0.5
    table.do(WorkFailed(client="a", assignment=table.work("a").id, reason="x"))
    table.ready("a")
    assert (table.round.number, table.round.terms.outer.bias1) == (1, 0.5)
    table.whole_round("a")
    assert (table.round.number, table.round.terms.outer.bias1) == (2, 0.75)


@pytest.mark.parametrize(("weight", "expected"), [("uniform", 1), ("samples", 8)])
def test_weight_comes_from_the_assignment(desk: MakeDesk, weight: str, expected: int) -> None:
    table = desk(2, merge={"weight": weight})
    table.send("a", "b", samples=10_000_000, tokens=10_000_000)
    assert [merge.weight for merge in table.sent(Merge, AGGREGATOR)] == [expected, expected]
    table.accept("a", "b")
    table.advance()
    assert {counted.weight for counted in table.closings()[0].closing.counted} == {expected}


def test_local_data_has_no_ranges(desk: MakeDesk) -> None:
    table = desk(2, data={"kind": "local"})
    assert table.work("a").ranges == ()
    assert table.work("a").steps == 4
    table.whole_round("a", "b")
    assert table.state.data.counted == 0


def test_a_measured_slow_client_gets_less(desk: MakeDesk) -> None:
    table = desk(3, rounds={"total": 5}, local={"steps": 8, "batch_size": 2}, merge={"weight": "samples"})
    table.now_ms += 8_000
    table.send("a", "b")
    table.now_ms += 8_000
    table.send("c")
    table.accept("a", "b", "c")
    table.advance()
    table.ready("a", "b", "c")
    assert [table.work(key).steps for key in "abc"] == [8, 8, 4]
    assert table.work("c").weight == 8
    assert sum(len(part) for part in table.work("c").ranges) == 8


def test_the_seed_depends_on_round_and_client_only() -> None:
    seeds = {
        work_seed(seed, plan, r, key) for seed in (0, 1) for plan in (0, 1) for r in (0, 1) for key in "ab"
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert work_seed(1, 2, 3, "a") == work_seed(1, 2, 3, "a")


# ----------------------------------------------------------------------------- what clients send
def test_an_update_goes_to_the_aggregator_at_once(desk: MakeDesk) -> None:
    table = desk(3)
    table.commit("a")
    assert table.entry("a").status == "committed"
    table.send("a", norm=2.5)
    (merge,) = table.sent(Merge, AGGREGATOR)
    assert (merge.assignment, merge.client, merge.norm, merge.update.blob) == ("0-0", "a", 2.5, "u0-0")
    assert table.entry("a").status == "opened"


def test_a_repeated_update_changes_nothing(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a")
    before = table.entry("a")
    assert table.send("a") == []
    assert table.entry("a") is before
    table.accept("a")
    assert table.send("a") == []
    assert table.entry("a").status == "agreed"


def test_an_update_that_was_not_committed_to_is_refused(desk: MakeDesk, contribute: Any) -> None:
    table = desk(2)
    table.commit("a")
    table.do(contribute(table.work("a"), commit="another"))
    assert table.entry("a").status == "refused"
    assert "committed" in table.sent(Abandon, "a")[0].reason
    table.do(Committed(client="b", round=0, assignment="0-1", commit="x"))
    table.do(Committed(client="b", round=0, assignment="0-1", commit="y"))
    assert table.entry("b").contribution.commit == "x", "the first commit binds"


@pytest.mark.parametrize(
    "claims", [{"norm": math.nan}, {"norm": math.inf}, {"norm": -1.0}, {"loss": math.nan}]
)
def test_claims_that_are_no_numbers_are_refused(desk: MakeDesk, claims: dict[str, float]) -> None:
    table = desk(2)
    table.send("a", **claims)
    assert table.entry("a").status == "refused"
    assert table.sent(Merge) == []


def test_nobody_speaks_for_another(desk: MakeDesk, contribute: Any) -> None:
    table = desk(2)
    stolen = contribute(table.work("a")).contribution
    forged = Contributed(
        contribution=type(stolen)(
            assignment=stolen.assignment,
            round=0,
            client="b",
            commit="h",
            update=stolen.update,
            claims=stolen.claims,
        )
    )
    assert table.do(forged) == []
    table.do(WorkFailed(client="b", assignment=table.work("a").id, reason="x"))
    assert table.entry("a").status == "assigned"


def test_late_and_unknown_work_is_told_to_stop(desk: MakeDesk, contribute: Any) -> None:
    table = desk(2, rounds={"total": 5})
    work = table.work("b")
    table.send("a")
    table.accept("a")
    table.at_deadline()
    table.advance()
    table.do(contribute(work))
    (abandon,) = table.sent(Abandon, "b")
    assert abandon.assignment == work.id
    table.do(Committed(client="a", round=9, assignment="9-9", commit="x"))
    assert table.sent(Abandon, "a")[0].assignment == "9-9"
    assert table.do(Committed(client="stranger", round=0, assignment="0-0", commit="x")) == []


def test_a_counted_update_that_comes_again_is_not_told_to_stop(desk: MakeDesk, contribute: Any) -> None:
    table = desk(1)
    work = table.work("a")
    table.whole_round("a")
    assert table.do(contribute(work)) == []


def test_who_was_lost_is_told_to_sign_in_again(desk: MakeDesk, contribute: Any) -> None:
    table = desk(2)
    work = table.work("a")
    table.do(Left(client="a", how="lost"))
    table.do(contribute(work))
    (dismissed,) = table.sent(Dismissed, "a")
    assert not dismissed.final


def test_failed_work_is_free_at_once_and_not_given_to_the_same_again(desk: MakeDesk) -> None:
    table = desk(2)
    free = table.state.data.free[0].start
    table.do(WorkFailed(client="a", assignment=table.work("a").id, reason="out of memory"))
    assert table.entry("a").status == "given_back"
    assert "out of memory" in table.entry("a").reason
    assert table.state.data.free[0].start == 0 < free
    assert len([e for e in table.round.entries.values() if e.assignment.client == "a"]) == 1


# ------------------------------------------------------------------ work that was lost in a round
def test_a_new_process_of_a_suspected_client_frees_its_range_at_once(desk: MakeDesk) -> None:
    table = desk(3)
    table.do(Suspected(client="b"), Joined(client="b", boot="b2"))
    assert table.entry("b").status == "given_back"
    assert [(part.start, part.stop) for part in table.state.data.free] == [(8, 16), (24, 1000)]


def test_lost_work_is_given_again_when_it_ends_with_the_others(desk: MakeDesk) -> None:
    table = desk(3, rounds={"total": 5}, local={"steps": 10, "batch_size": 1})
    table.now_ms += 10_000
    table.whole_round("a", "b", "c")
    table.do(Suspected(client="b"), Joined(client="b", boot="b2", has_round=1))
    table.now_ms += 4_000
    table.ready("b")
    assert table.work("b").steps == 6, "the others need 6 of 10 s more"
    assert table.entry("b").status == "assigned"


def test_lost_work_is_not_given_again_when_the_others_are_nearly_done(desk: MakeDesk) -> None:
    table = desk(3, rounds={"total": 5}, local={"steps": 10, "batch_size": 1})
    table.now_ms += 10_000
    table.whole_round("a", "b", "c")
    table.do(Suspected(client="b"), Joined(client="b", boot="b2", has_round=1))
    table.now_ms += 9_000
    table.ready("b")
    assert table.entry("b").status == "given_back"


def test_a_round_that_lost_all_its_work_starts_over(desk: MakeDesk) -> None:
    table = desk(1)
    table.do(Suspected(client="a"), Joined(client="a", boot="a2"))
    assert (table.round.number, table.entry("a").status) == (0, "given_back")
    table.ready("a")
    assert (table.round.number, table.entry("a").status) == (0, "assigned")
    assert table.work("a").id == "0-1"
    assert table.work("a").ranges[0].start == 0
    table.whole_round("a")
    closing = table.closings()[0].closing
    assert [c.assignment for c in closing.counted] == ["0-1"]
    assert [u.assignment for u in closing.uncounted] == ["0-0"]


def test_a_client_that_always_dies_fails_the_round_in_the_end(desk: MakeDesk) -> None:
    table = desk(1, rounds={"max_failed": 1})
    for boot in "234":
        table.do(Suspected(client="a"), Joined(client="a", boot=boot))
        table.ready("a")
    assert len(table.closed[0].entries) == 3
    assert table.state.phase == "paused"


def test_what_is_stored_counts_without_its_client(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a", "b")
    table.do(Left(client="a", how="lost"))
    assert table.entry("a").status == "opened"
    works = [table.work("a"), table.work("b")]
    table.do(*[Verdict(by=AGGREGATOR, round=0, assignment=w.id, accepted=True) for w in works])
    table.advance()
    assert [c.client for c in table.closings()[0].closing.counted] == ["a", "b"]
