"""The log: order, fencing, resumption, compaction, and many threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from manyhands.coordination.effects import Effect, PhaseChanged
from manyhands.coordination.events import Evaluated
from manyhands.coordination.machine import NumberedEffect
from manyhands.coordination.records import Record
from manyhands.coordination.state import DataLedger, RunState
from manyhands.coordination.types import AGGREGATOR, EVERYONE
from manyhands.errors import Fenced, StorageError
from manyhands.plan.schema import Plan
from manyhands.storage.database import Database, open_database
from manyhands.storage.events import RunLog, outbox_query
from manyhands.storage.runs import create_run, get_run

Make = Callable[..., tuple[list[Record], list[NumberedEffect]]]


def state_after(sequence: int) -> RunState:
    data = DataLedger(total=1)
    return RunState(run_id="run-1", plan=Plan(), phase="waiting", sequence=sequence, data=data, snapshots=())


def test_append_and_load(log: RunLog, batch: Make) -> None:
    epoch = log.acquire("host:1", 5)
    assert log.load().records == ()
    log.append(epoch, 0, *batch(0, 3))
    log.append(epoch, 3, *batch(3, 2), state_after(5), phase="training")
    log.append(epoch, 5, *batch(5, 2))
    loaded = log.load()
    assert loaded.state == state_after(5)
    assert list(loaded.records) == batch(5, 2)[0]
    assert list(log.all_records()) == batch(0, 7)[0]
    assert len([*log.all_records()]) == 7
    assert get_run(log._database, "run-1").phase == "training"


def test_pages_of_records_join_without_gap(log: RunLog, batch: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhands.storage.events._PAGE", 3)
    epoch = log.acquire("host:1")
    for count in (3, 3, 1):  # ends within a page, at a page's end, after one
        log.append(epoch, len([*log.all_records()]), *batch(len([*log.all_records()]), count))
        assert list(log.all_records()) == batch(0, len([*log.all_records()]))[0]
    assert [record.sequence for record in log.all_records(after=4)] == [5, 6, 7]


def test_sequence_must_follow(log: RunLog, batch: Make) -> None:
    epoch = log.acquire("host:1")
    log.append(epoch, 0, *batch(0, 2))
    events, effects = batch(2, 2)
    with pytest.raises(StorageError, match="ends at event 2, not at 1"):
        log.append(epoch, 1, *batch(1))
    with pytest.raises(StorageError, match="ends at event 2, not at 3"):
        log.append(epoch, 3, *batch(3))
    with pytest.raises(StorageError, match="event 4 appended where 3 was expected"):
        log.append(epoch, 2, events[1:], [])
    with pytest.raises(StorageError, match=r"effect \(4, 0\) belongs to no event"):
        log.append(epoch, 2, events[:1], effects)
    with pytest.raises(StorageError, match="a state after event 3 was given, the log would end at 4"):
        log.append(epoch, 2, events, effects, state_after(3))
    with pytest.raises(StorageError, match="seed"):
        log.append(epoch, 2, [replace(events[0], seed=2**63)], [])
    assert len([*log.all_records()]) == 2


def test_append_is_all_or_nothing(log: RunLog, batch: Make) -> None:
    epoch = log.acquire("host:1")
    events, effects = batch(0, 2)
    with pytest.raises(StorageError):  # the same effect twice: refused after the events went in
        log.append(epoch, 0, events, [*effects, effects[0]])
    assert len([*log.all_records()]) == 0
    assert log.effects_after("x", (0, 0)) == []
    log.append(epoch, 0, events, effects)


def test_an_older_owner_is_fenced_and_told_where(log: RunLog, batch: Make) -> None:
    old = log.acquire("old:1", 10)
    log.append(old, 0, *batch(0))
    new = log.acquire("new:2", 20)
    assert new == old + 1
    for act in (
        lambda: log.append(old, 1, *batch(1)),
        lambda: log.append(old, 1, [], []),
        lambda: log.renew(old),
        lambda: log.release(old),
        lambda: log.compact(old, 1),
    ):
        with pytest.raises(Fenced, match=r"taken over \(epoch 2, this server has 1\): it is now at new:2"):
            act()
    assert len([*log.all_records()]) == 1
    log.append(new, 1, *batch(1))
    log.renew(new, 30)
    lease = log.lease()
    assert (lease.epoch, lease.owner, lease.renewed_ms) == (2, "new:2", 30)
    log.release(new, 40)
    lease = log.lease()
    assert (lease.epoch, lease.owner, lease.renewed_ms) == (2, None, 40), "who comes next knows since when"


def test_unknown_run(database: Database) -> None:
    log = RunLog(database, "nowhere")
    for act in (log.load, log.lease, lambda: log.acquire("x"), lambda: list(log.all_records())):
        with pytest.raises(StorageError, match="run 'nowhere' is not in database"):
            act()


def test_effects_go_to_whom_they_are_addressed(log: RunLog, batch: Make) -> None:
    epoch = log.acquire("host:1")
    events, _ = batch(0, 3)
    names = [("alice", EVERYONE), (AGGREGATOR,), (EVERYONE, "alice", "bob")]
    effects = [
        NumberedEffect(sequence=s + 1, n=n, effect=Effect(to=to, body=PhaseChanged(phase="p", reason="r")))
        for s, row in enumerate(names)
        for n, to in enumerate(row)
    ]
    log.append(epoch, 0, events, effects)

    def ids(recipient: str, after: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
        return [record.id for record in log.effects_after(recipient, after)]

    assert ids("alice") == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert ids("alice", (1, 0)) == [(1, 1), (3, 0), (3, 1)]
    assert ids("bob", (1, 1)) == [(3, 0), (3, 2)]
    assert ids(AGGREGATOR) == [(2, 0)]
    assert ids("alice", (3, 2)) == []
    assert log.effects_after("alice", (0, 0)) == [e for e in effects if e.effect.to in ("alice", EVERYONE)]
    assert [record.id for record in log.effects_after("alice", (0, 0), limit=2)] == [(1, 0), (1, 1)]


def test_resumption_reads_an_index(log: RunLog) -> None:
    """A reconnect must not read what others got."""
    query = outbox_query("run-1", "alice", (5, 1), None).compile(compile_kwargs={"literal_binds": True})
    with log._database.read() as connection:
        plan = " ".join(str(row) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}").all())
    assert "INDEX effects_by_recipient (run_id=? AND recipient=? AND sequence>?)" in plan
    assert "TEMP B-TREE" not in plan


def test_compaction_keeps_events_and_says_who_must_join_anew(log: RunLog, batch: Make) -> None:
    epoch = log.acquire("host:1")
    log.append(epoch, 0, *batch(0, 3), state_after(3))
    log.append(epoch, 3, *batch(3, 3), state_after(6))
    log.compact(epoch, 4)
    assert list(log.all_records()) == batch(0, 6)[0]
    assert [record.sequence for record in log.effects_after("x", (4, 0))] == [5, 6]
    with pytest.raises(StorageError, match=r"were dropped \(kept from event 4\): 'x' has to join anew"):
        log.effects_after("x", (3, 0))
    assert log.load().state == state_after(6)
    with log._database.read() as connection:
        assert connection.exec_driver_sql("SELECT sequence FROM state_snapshots").scalars().all() == [6]
    log.compact(epoch, 2)  # never goes back
    with pytest.raises(StorageError, match="kept from event 4"):
        log.effects_after("x", (3, 0))


def test_runs_do_not_mix(log: RunLog, batch: Make) -> None:
    create_run(log._database, "run-2", b"{}", "s")
    other = RunLog(log._database, "run-2")
    log.append(log.acquire("a"), 0, *batch(0, 4), state_after(4))
    epoch = other.acquire("b")
    other.append(epoch, 0, *batch(0, 1))
    assert other.load().state is None
    assert len(other.load().records) == 1
    other.compact(epoch, 5)
    assert len(log.effects_after("x", (0, 0))) == 4
    assert log.load().state is not None


def test_a_diverged_loss_is_stored_as_it_is(log: RunLog) -> None:
    event = Evaluated(round=1, loss=float("inf"), samples=3, metrics={"a": -0.0, "b": 5e-324})
    log.append(log.acquire("a"), 0, [Record(sequence=1, now_ms=0, seed=0, event=event)], [])
    assert log.load().records[0].event == event


def test_many_threads_append_one_log(log: RunLog, batch: Make) -> None:
    """Each thread appends where the log ends; who lost the race tries again: no gap, no double, nothing lost."""
    epoch = log.acquire("host:1")
    mine: list[int] = []
    refused: list[str] = []

    def appender() -> None:
        done = 0
        while done < 8:
            last = len([*log.all_records()])
            try:
                log.append(epoch, last, *batch(last, 2))
            except StorageError as error:
                refused.append(str(error))
                continue
            mine.append(last)
            done += 1

    threads = [threading.Thread(target=appender) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(mine) == list(range(0, 64, 2))
    assert [record.sequence for record in log.all_records()] == list(range(1, 65))
    assert all("load it again" in text for text in refused)


def test_racing_owners_get_different_epochs(log: RunLog) -> None:
    epochs: list[int] = []
    other = open_database(log._database.path)
    logs = [log, RunLog(other, "run-1")]
    threads = [
        threading.Thread(target=lambda log=log: epochs.extend(log.acquire("x") for _ in range(5)))
        for log in logs * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epochs) == list(range(1, 21))
    other.close()
