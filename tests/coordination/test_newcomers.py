"""What a client is given to start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyhands.coordination.events import SnapshotStored
from manyhands.coordination.newcomers import catch_up
from manyhands.coordination.types import AGGREGATOR, BlobRef, Snapshot


def test_who_starts_from_a_snapshot_hears_of_the_closings_before_it(desk: Callable[..., Any]) -> None:
    table = desk(2, rounds={"total": 9, "snapshot_every": 2, "keep_updates": 4})
    for _ in range(2):
        table.whole_round("a", "b")
    snapshot = Snapshot(round=2, blob=BlobRef(blob="5" * 64, size_bytes=1), fingerprint="f2")
    table.do(SnapshotStored(by=AGGREGATOR, snapshot=snapshot))
    table.whole_round("a", "b")
    way = catch_up(table.state, None)
    assert way.snapshot == snapshot
    assert [closed.closing.round for closed in way.closed] == [2]
    assert [closing.round for closing in way.earlier] == [0, 1], "they settle what it had sent"


def test_who_holds_the_round_before_needs_no_snapshot(desk: Callable[..., Any]) -> None:
    table = desk(2, rounds={"total": 9})
    table.whole_round("a", "b")
    way = catch_up(table.state, 0)
    assert way.snapshot is None
    assert [closed.closing.round for closed in way.closed] == [0]
    assert way.earlier == ()
