from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.effects import Abandon, CatchUp, Evaluate, TakeSnapshot
from manyhands.coordination.events import (
    Checkpointed,
    Evaluated,
    Fingerprinted,
    Left,
    SnapshotStored,
    Suspected,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.newcomers import catch_up, fingerprint_at, held_at
from manyhands.coordination.snapshots import kept_blobs
from manyhands.coordination.types import AGGREGATOR, EVALUATOR, BlobRef, Snapshot

MakeDesk = Callable[..., Any]


def snapshot(number: int, fingerprint: str | None = None, outer: str | None = None) -> Snapshot:
    blob = BlobRef(blob=f"s{number}", size_bytes=1)
    return Snapshot(round=number, blob=blob, fingerprint=fingerprint or f"f{number}", outer_fingerprint=outer)


def stored(by: str, number: int, fingerprint: str | None = None, outer: str | None = None) -> SnapshotStored:
    return SnapshotStored(by=by, snapshot=snapshot(number, fingerprint, outer))


def rounds_of(table: Any) -> list[int]:
    return [kept.round for kept in table.state.snapshots]


# ------------------------------------------------------------------------------------------- star
def test_the_first_snapshot_is_evaluated_at_the_start(desk: MakeDesk) -> None:
    table = desk(1)
    asked = [e.body for e in table.all_effects if e.to == EVALUATOR]
    assert asked == [Evaluate(snapshot=table.initial.snapshots[0], checkpoint=False)]


def test_the_aggregator_is_asked_every_so_many_closings(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 9, "snapshot_every": 2})
    table.whole_round("a")
    assert table.state.snapshot_asked is None
    table.send("a")
    table.accept("a")
    table.advance()
    assert table.sent(TakeSnapshot, AGGREGATOR) == [TakeSnapshot(round=2)]


def test_only_the_agreed_fingerprint_is_accepted(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 9, "snapshot_every": 1})
    table.whole_round("a")
    table.do(stored(AGGREGATOR, 1, "wrong"), stored("a", 1), stored(AGGREGATOR, 2), stored(AGGREGATOR, 0))
    assert rounds_of(table) == [0]
    table.do(stored(AGGREGATOR, 1))
    assert rounds_of(table) == [0, 1]
    assert table.state.snapshot_asked is None
    assert table.do(stored(AGGREGATOR, 1)) == []


def test_an_aggregator_that_does_not_deliver_is_asked_again(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 9, "snapshot_every": 1, "first_deadline_s": 1000.0})
    table.whole_round("a")
    table.after(60_000)
    assert table.sent(TakeSnapshot, AGGREGATOR) == [TakeSnapshot(round=table.state.closed_rounds)]
    table.after(1_000)
    assert table.sent(TakeSnapshot) == []


def test_two_snapshots_and_the_closings_since_the_older_one_stay(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 20, "snapshot_every": 2, "keep_updates": 1})
    for number in range(1, 7):
        table.whole_round("a")
        if number % 2 == 0:
            table.do(stored(AGGREGATOR, number), Evaluated(round=number, loss=1.0, samples=1))
        table.do(Evaluated(round=0, loss=2.0, samples=1))
    assert rounds_of(table) == [4, 6]
    assert [closed.closing.round for closed in table.state.history] == [4, 5]
    assert fingerprint_at(table.state, 6) == "f6"
    assert fingerprint_at(table.state, 4) == "f4"
    assert fingerprint_at(table.state, 2) is None
    assert table.state.evaluations == {0: 2.0, 2: 1.0, 4: 1.0, 6: 1.0}


def test_history_keeps_what_the_archive_is_to_keep(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 20, "snapshot_every": 1, "keep_updates": 4})
    for number in range(1, 9):
        table.whole_round("a")
        table.do(stored(AGGREGATOR, number))
    assert [closed.closing.round for closed in table.state.history] == [4, 5, 6, 7]
    kept = kept_blobs(table.state)
    assert {"s7", "s8", "change4", "change7", "u7-7", "u4-4"} <= kept
    assert "u3-3" not in kept
    assert "change3" not in kept


def test_a_snapshot_waits_for_a_slow_evaluator_up_to_a_number(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 20, "snapshot_every": 1})
    for number in range(1, 9):
        table.whole_round("a")
        table.do(stored(AGGREGATOR, number))
    assert rounds_of(table) == [5, 6, 7, 8]
    assert sorted(table.state.to_evaluate) == [5, 6, 7, 8]


def test_every_nth_snapshot_is_evaluated_and_the_last_with_a_checkpoint(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 5, "snapshot_every": 1}, evaluation={"every_snapshots": 2})
    for number in range(1, 6):
        table.whole_round("a")
        table.do(stored(AGGREGATOR, number))
    asked = [e.body for e in table.all_effects if e.to == EVALUATOR]
    assert [(e.snapshot.round, e.checkpoint) for e in asked] == [
        (0, False),
        (2, False),
        (4, False),
        (5, True),
    ]


def test_no_evaluation_means_first_and_last(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 2, "snapshot_every": 1}, evaluation={"every_snapshots": 0})
    for number in (1, 2):
        table.whole_round("a")
        table.do(stored(AGGREGATOR, number))
    asked = [e.body for e in table.all_effects if e.to == EVALUATOR]
    assert [(e.snapshot.round, e.checkpoint) for e in asked] == [(0, False), (2, True)]


def test_results_that_nobody_asked_for_change_nothing(desk: MakeDesk) -> None:
    table = desk(1)
    table.do(Evaluated(round=5, loss=1.0, samples=1), Checkpointed(round=0, path="p"))
    assert table.state.evaluations == {}
    assert table.state.checkpointed is None
    table.do(Evaluated(round=0, loss=float("nan"), samples=1))
    table.do(Evaluated(round=0, loss=1.0, samples=1))
    assert table.state.evaluations == {0: float("inf")}


def test_the_shortest_way_to_public(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 20, "snapshot_every": 4})
    for number in range(1, 7):
        table.whole_round("a")
        if number == 4:
            table.do(stored(AGGREGATOR, 4))
    for has_round, start, count in [
        (None, 4, 2),
        (6, None, 0),
        (4, None, 2),
        (3, None, 3),
        (2, 4, 2),
        (0, 4, 2),
    ]:
        way = catch_up(table.state, has_round)
        assert (None if way.snapshot is None else way.snapshot.round, len(way.closed)) == (start, count)
        assert way.round == 6
    assert catch_up(table.state, 99).snapshot is not None, "nobody holds a public that does not exist"


def test_a_client_with_another_public_starts_again(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 9, "snapshot_every": 5})
    table.whole_round("a", "b")
    table.do(Fingerprinted(client="a", round=0, fingerprint="f1"))
    assert table.effects == []
    table.do(Fingerprinted(client="b", round=0, fingerprint="other"))
    (way,) = table.sent(CatchUp, "b")
    assert way.snapshot is not None
    assert table.state.clients["b"].status == "catching_up"
    assert table.state.clients["b"].resynced == 1
    assert table.entry("b").status == "given_back"


# ------------------------------------------------------------------------------------------- mesh
def report(table: Any, number: int, outer: str | None = None, **fingerprints: str) -> None:
    table.do(
        *[
            Fingerprinted(client=k, round=number, fingerprint=f, outer_fingerprint=outer)
            for k, f in fingerprints.items()
        ]
    )


def closed_mesh(desk: MakeDesk, clients: int, min_clients: int = 2) -> Any:
    """One round of a mesh is closed; nobody has said anything since."""
    membership = {"min_clients": min(clients, min_clients)}
    table = desk(clients, topology="mesh", rounds={"total": 9, "snapshot_every": 1}, membership=membership)
    keys = "abcdef"[:clients]
    table.do(*[WorkFailed(client=k, assignment=table.work(k).id, reason="x") for k in keys[1:]])
    table.send("a")
    for key in keys[1:2]:
        table.do(Verdict(by=key, round=0, assignment="0-0", accepted=True))
    assert table.state.closed_rounds == 1
    return table


def test_the_fingerprint_of_most_is_agreed(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    report(table, 0, a="x")
    assert fingerprint_at(table.state, 1) is None
    report(table, 0, b="x")
    assert fingerprint_at(table.state, 1) == "x"
    assert table.state.history[0].fingerprint == "x"
    report(table, 0, c="y")
    assert table.sent(CatchUp, "c")
    assert table.state.clients["c"].resynced == 1


def test_who_differed_before_the_agreement_starts_again_too(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    report(table, 0, a="y", b="x", c="x")
    assert table.sent(CatchUp, "a")
    assert table.state.clients["a"].status == "catching_up"


def test_without_a_majority_the_most_reliable_client_decides(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 2)
    report(table, 0, b="y")
    assert fingerprint_at(table.state, 1) is None
    report(table, 0, a="x")
    assert table.state.clients["a"].counted == 1
    assert fingerprint_at(table.state, 1) == "x"
    assert table.sent(CatchUp, "b")


def test_a_client_whose_outer_state_differs_starts_again(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    report(table, 0, "o", a="x")
    report(table, 0, "p", b="x")
    assert held_at(table.state, 1) is None, "one of three for each"
    report(table, 0, "o", c="x")
    assert held_at(table.state, 1) == ("x", "o")
    assert table.sent(CatchUp, "b")
    assert [client.resynced for client in table.state.clients.values()] == [0, 1, 0]


def test_a_snapshot_with_another_outer_state_is_asked_of_another(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    table.do(stored("a", 1, "x", "wrong"))
    report(table, 0, "o", b="x", c="x")
    assert rounds_of(table) == [0]
    (asked,) = [e for e in table.effects if isinstance(e.body, TakeSnapshot)]
    table.do(stored(asked.to, 1, "x", "o"))
    assert rounds_of(table) == [0, 1]
    way = catch_up(table.state, None)
    assert (way.snapshot.fingerprint, way.snapshot.outer_fingerprint) == ("x", "o")


def test_a_client_that_hangs_does_not_hold_up_the_vote(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 2, min_clients=1)
    table.ready("a")
    table.at_deadline()
    table.send("a")
    table.do(Verdict(by="b", round=1, assignment=table.work("a").id, accepted=True))
    report(table, 1, a="x")
    assert fingerprint_at(table.state, 2) == "x", "b has not even applied the one before"


def test_a_client_that_goes_leaves_the_vote_to_the_others(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 2)
    report(table, 0, a="x")
    assert fingerprint_at(table.state, 1) is None
    table.do(Left(client="b", how="lost"))
    assert fingerprint_at(table.state, 1) == "x"


def test_the_most_reliable_client_is_asked_and_another_when_it_goes(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    assert table.state.snapshot_asked == (1, "a", table.now_ms)
    table.do(Suspected(client="a"))
    assert table.sent(TakeSnapshot, "b") == [TakeSnapshot(round=1)]
    table.do(stored("a", 1, "x"))
    report(table, 0, b="x", c="x")
    assert rounds_of(table) == [0], "a is not asked any more"
    table.after(100_000)
    assert table.sent(TakeSnapshot, "c"), "b is late"


def test_a_snapshot_waits_for_its_fingerprint(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    table.do(stored("a", 1, "x"))
    assert rounds_of(table) == [0]
    report(table, 0, b="x", c="x")
    assert rounds_of(table) == [0, 1]
    assert table.state.snapshot_asked is None


def test_a_wrong_snapshot_is_asked_of_another(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    table.do(stored("a", 1, "wrong"))
    report(table, 0, b="x", c="x")
    assert rounds_of(table) == [0]
    assert table.sent(TakeSnapshot, "b")


def test_a_snapshot_does_not_wait_for_silent_clients_for_ever(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 4)
    table.ready("a", "b", "c", "d")
    table.do(stored("a", 1, "x"))
    report(table, 0, b="x")
    assert rounds_of(table) == [0], "c and d have not said anything, and two of four are not most"
    table.after(100_000)
    assert rounds_of(table) == [0, 1]
    assert fingerprint_at(table.state, 1) == "x"


def test_a_report_while_catching_up_counts_and_is_compared_when_it_is_ready(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    report(table, 0, a="x")
    table.do(Left(client="c", how="lost"))
    table.join("c", boot="2", has_round=0)
    report(table, 0, c="y", b="x")
    assert fingerprint_at(table.state, 1) == "x"
    assert table.state.clients["c"].resynced == 0
    table.ready("c")
    assert table.state.clients["c"].resynced == 1
    assert table.sent(CatchUp, "c")
    table.ready("c")
    assert table.state.clients["c"].status == "ready", "what it said of its old public is forgotten"


def test_nobody_starts_again_and_again_for_the_same_closing(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    report(table, 0, a="x", b="x", c="y")
    table.ready("c")
    report(table, 0, c="y")
    assert table.state.clients["c"].status == "ready"
    assert table.state.clients["c"].resynced == 1


def test_a_fingerprint_that_nobody_has_any_more_is_agreed_anew(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 3)
    table.ready("a", "b", "c")
    report(table, 0, a="x", b="x", c="x")
    table.do(stored("a", 1, "y"))
    assert table.state.clients["a"].resynced == 1, "first it starts again"
    table.do(Left(client="c", how="lost"), stored("b", 1, "y"))
    assert table.state.clients["b"].resynced == 1
    table.ready("a", "b")
    report(table, 0, a="y", b="y")
    assert fingerprint_at(table.state, 1) == "x"
    table.do(stored(table.state.snapshot_asked[1], 1, "y"))
    assert fingerprint_at(table.state, 1) == "y", "from the snapshot, both get to the same"
    assert rounds_of(table) == [0, 1]


def test_nobody_to_ask_yet(desk: MakeDesk) -> None:
    table = closed_mesh(desk, 1)
    table.do(Suspected(client="a"))
    assert table.state.snapshot_asked[1] == ""
    table.join("a", boot="2", has_round=1)
    assert table.sent(TakeSnapshot) == []
    table.ready("a")
    assert table.sent(TakeSnapshot, "a") == [TakeSnapshot(round=1)]


def test_a_closing_that_changes_nothing_keeps_the_fingerprint(desk: MakeDesk) -> None:
    table = desk(2, topology="mesh", rounds={"total": 9})
    table.do(*[WorkFailed(client=k, assignment=table.work(k).id, reason="x") for k in "ab"])
    assert fingerprint_at(table.state, 1) == "f0"


def test_a_mesh_keeps_the_updates_that_newcomers_need(desk: MakeDesk) -> None:
    table = desk(2, topology="mesh", rounds={"total": 9, "snapshot_every": 5, "keep_updates": 1})
    for _ in range(3):
        table.whole_mesh_round("a", "b")
    assert {"first", "u0-0", "u1-2", "u2-5"} <= kept_blobs(table.state)


def test_resync_gives_back_the_work_that_was_based_on_it(desk: MakeDesk) -> None:
    table = desk(3, topology="mesh", rounds={"total": 9, "snapshot_every": 5})
    table.send("a", "b", "c")
    for key, other in (("a", "b"), ("b", "c"), ("c", "a")):
        table.do(Verdict(by=other, round=0, assignment=table.work(key).id, accepted=True))
    table.ready("a", "b", "c")
    assert table.entry("c").status == "assigned"
    report(table, 0, a="x", b="x", c="y")
    assert table.entry("c").status == "given_back"
    assert table.sent(Abandon, "c") == [], "CatchUp says it"
