from __future__ import annotations

import pytest

from manyhands.coordination.types import BlobRef
from manyhands.errors import StorageError
from manyhands.storage.blob_index import BlobIndex, BlobKind
from manyhands.storage.database import Database
from manyhands.storage.runs import create_run


def ref(number: int) -> BlobRef:
    return BlobRef(blob=f"{number:064x}", size_bytes=10 * number)


@pytest.fixture
def index(database: Database) -> BlobIndex:
    create_run(database, "run-1", b"{}", "s")
    create_run(database, "run-2", b"{}", "s")
    return BlobIndex(database, "run-1")


def test_what_is_added_is_listed_once(index: BlobIndex) -> None:
    index.add(ref(1), "update", round=3, created_ms=5)
    index.add(ref(1), "update", round=2, created_ms=6)
    index.add(ref(1), "snapshot", created_ms=7)
    index.add(ref(2), "material", created_ms=8)
    assert [(blob.kind, blob.round, blob.created_ms) for blob in index.get(ref(1).blob)] == [
        ("update", 3, 5),
        ("snapshot", None, 7),
    ]
    assert [blob.ref for blob in index.all("material")] == [ref(2)]
    assert len(index.all()) == 3
    assert index.get(ref(9).blob) == []


def test_wrong_entries_are_refused(index: BlobIndex) -> None:
    index.add(ref(1), "update", round=1)
    with pytest.raises(StorageError, match="has 10 bytes in the index, 11 were given"):
        index.add(BlobRef(blob=ref(1).blob, size_bytes=11), "update", round=1)
    with pytest.raises(StorageError, match="kind 'song' is unknown"):
        index.add(ref(1), "song")  # type: ignore[arg-type]


def test_only_what_nobody_needs_is_deletable(index: BlobIndex, database: Database) -> None:
    other = BlobIndex(database, "run-2")
    index.add(ref(1), "update", round=0)  # old: goes
    index.add(ref(2), "update", round=5)  # of a kept round
    index.add(ref(3), "update", round=1)  # renewed by a later round
    index.add(ref(3), "update", round=5)
    index.add(ref(4), "update", round=1)  # also a snapshot
    index.add(ref(4), "snapshot")
    index.add(ref(5), "update", round=1)  # another run uses it, even if as an old update there
    other.add(ref(5), "update", round=0)
    index.add(ref(6), "change", round=0)  # of a kind that is not asked for
    index.add(ref(7), "update")  # of no round
    index.add(ref(8), "update", round=1)
    index.add(ref(9), "material")
    assert index.deletable({"update": 2}) == [ref(1).blob, ref(8).blob]
    assert index.deletable({"update": 0}) == []
    assert index.deletable({}) == []

    index.add(ref(8), "update", round=6)  # renewed between the question and the forgetting
    index.forget([ref(1).blob, ref(8).blob], {"update": 2})
    assert index.get(ref(1).blob) == []
    assert [blob.round for blob in index.get(ref(8).blob)] == [6]
    assert index.deletable({"update": 2}) == []
    index.forget([ref(5).blob], {"update": 2})
    assert other.deletable({"update": 1}) == [ref(5).blob]


def test_every_kind_has_its_own_limit(index: BlobIndex) -> None:
    for number in range(4):
        index.add(ref(10 + number), "change", round=number)
        index.add(ref(20 + number), "snapshot", round=number)
    index.add(ref(10), "update", round=2)  # the same bytes, for another purpose
    limits: dict[BlobKind, int] = {"change": 3, "snapshot": 1, "update": 2}
    assert index.deletable(limits) == [ref(20).blob, ref(11).blob, ref(12).blob]
    assert index.deletable({**limits, "update": 3})[0] == ref(10).blob
    assert index.deletable({**limits, "update": 3}).count(ref(10).blob) == 1
    index.forget([ref(11).blob, ref(13).blob], limits)
    assert [blob.round for blob in index.all("change")] == [0, 2, 3]
