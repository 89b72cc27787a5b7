from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.events import (
    Checkpointed,
    Evaluated,
    Fingerprinted,
    Joined,
    Left,
    SnapshotStored,
    Suspected,
    WorkFailed,
)
from manyhands.coordination.ledger import account, recorded_rounds
from manyhands.coordination.types import AGGREGATOR, BlobRef, Snapshot

MakeDesk = Callable[..., Any]


def test_who_did_what_and_what_counted(desk: MakeDesk) -> None:
    table = desk(3)
    table.now_ms += 5_000
    table.send("a", "b", loss=2.5, threads=4, start="fresh")
    table.do(WorkFailed(client="c", assignment=table.work("c").id, reason="out of memory"))
    table.accept("b", "a")
    table.now_ms += 10
    table.advance()
    told = account(table.initial, table.records)
    (round_,) = told.rounds
    assert [work.assignment.client for work in round_.works] == ["a", "b", "c"]
    a, b, c = round_.works
    assert (a.counted, a.position, b.position, a.factor) == (True, 1, 0, 1.0)
    assert (a.claims.loss, a.claims.threads, a.duration_ms) == (2.5, 4, 5_000)
    assert (c.counted, c.claims, c.duration_ms) == (False, None, None)
    assert "out of memory" in c.reason
    assert (round_.fingerprint, round_.change.blob) == ("f1", "change0")
    assert round_.published_ms - round_.closing.closed_ms == 10
    assert told.state == table.state


def test_the_account_of_a_lost_client(desk: MakeDesk) -> None:
    table = desk(3, rounds={"total": 9, "deadline_floor_s": 60.0}, membership={"min_clients": 1})
    table.whole_round("a", "b", "c")
    table.now_ms += 100
    table.do(Suspected(client="c"))
    lost = table.work("c").id
    table.now_ms += 30_000
    table.do(Left(client="c", how="lost"))
    table.whole_round("a", "b")
    table.do(Joined(client="c", boot="c2"))
    table.ready("c")
    table.now_ms += 1_000
    table.whole_round("a", "b")
    table.ready("a", "b", "c")
    table.whole_round("a", "b", "c")
    told = account(table.initial, table.records)
    (absence,) = told.absences
    assert (absence.client, absence.how, absence.gone_ms, absence.gone_round) == ("c", "lost", 1100, 1)
    assert absence.given_back == (lost,)
    assert absence.rejoined_ms is not None
    assert absence.rejoined_ms == 31_100
    assert (absence.rejoined_round, absence.merged_round) == (2, 3)
    kinds = [incident.kind for incident in told.incidents if incident.client == "c"]
    assert kinds == ["joined", "suspected", "lost", "rejoined"]
    assert lost in next(i.detail for i in told.incidents if i.kind == "lost")


def test_a_client_that_was_back_before_it_was_missed(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 9})
    table.do(Suspected(client="b"), Joined(client="b", boot="b2"))
    table.send("a")
    table.accept("a")
    table.advance()
    table.ready("a", "b")
    told = account(table.initial, table.records)
    (absence,) = told.absences
    assert (absence.how, absence.rejoined_round, absence.merged_round) == ("restarted", 0, None)
    assert absence.given_back == ("0-1",)
    table.whole_round("a", "b")
    assert account(table.initial, table.records).absences[0].merged_round == 1


def test_an_update_from_before_the_loss_is_not_its_return(desk: MakeDesk) -> None:
    table = desk(2, rounds={"total": 9})
    table.send("a", "b")
    table.do(Suspected(client="b"), Joined(client="b", boot="b2"))
    table.accept("a", "b")
    table.advance()
    told = account(table.initial, table.records)
    assert told.rounds[0].works[1].counted
    assert told.absences[0].merged_round is None


def test_fingerprints_of_a_mesh_come_later(desk: MakeDesk) -> None:
    table = desk(2, topology="mesh", rounds={"total": 9})
    table.whole_mesh_round("a", "b")
    told = account(table.initial, table.records)
    assert told.rounds[0].fingerprint == "f1"
    assert told.rounds[0].works[0].witnesses == ("b", "server")
    table.do(Fingerprinted(client="b", round=0, fingerprint="other"))
    kinds = [incident.kind for incident in account(table.initial, table.records).incidents]
    assert kinds.count("resynced") == 1


def test_evaluations_snapshots_checkpoints_and_phases(desk: MakeDesk) -> None:
    table = desk(1, rounds={"total": 1})
    table.do(Evaluated(round=0, loss=4.0, samples=7, metrics={"ppl": 54.6}))
    table.whole_round("a")
    snapshot = Snapshot(round=1, blob=BlobRef(blob="s", size_bytes=1), fingerprint="f1")
    table.do(SnapshotStored(by=AGGREGATOR, snapshot=snapshot), Evaluated(round=1, loss=3.0, samples=7))
    table.do(Evaluated(round=1, loss=9.0, samples=7), Checkpointed(round=1, path="here"))
    told = account(table.initial, table.records)
    assert [(e.round, e.loss, e.metrics) for e in told.evaluations] == [(0, 4.0, {"ppl": 54.6}), (1, 3.0, {})]
    assert [kept.round for kept in told.snapshots] == [0, 1]
    assert told.checkpoints == (Checkpointed(round=1, path="here"),)
    assert [p.phase for p in told.phases] == ["warming_up", "training", "checkpointing", "finished"]
    assert told.open_rounds == ()


def test_what_a_replay_needs(desk: MakeDesk) -> None:
    table = desk(2)
    table.send("a", start="fresh", threads=1)
    table.do(WorkFailed(client="b", assignment=table.work("b").id, reason="x"))
    table.accept("a")
    table.advance()
    table.ready("a", "b")
    table.send("a", start="0-0", threads=1)
    table.send("b")
    table.accept("b")
    table.at_deadline()
    table.at_deadline()
    table.advance()
    first, second = recorded_rounds(table.initial, table.records)
    assert first.terms.round == 0
    assert [(w.assignment.id, w.counted, w.update is None) for w in first.works] == [
        ("0-0", True, False),
        ("0-1", False, True),
    ]
    assert [(w.counted, w.claims.start) for w in second.works] == [(False, "0-0"), (True, "fresh")]
    assert second.works[0].update is not None, "it was sent, so its client has to restore"
    assert (second.closing.round, second.fingerprint) == (1, "f2")
