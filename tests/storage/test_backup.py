from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.errors import StorageError
from manyhands.storage.backup import backup
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog

Make = Callable[..., tuple[list[object], list[object]]]


def test_a_copy_under_load_is_one_moment_of_the_log(log: RunLog, batch: Make, tmp_path: Path) -> None:
    epoch = log.acquire("host:1")
    log.append(epoch, 0, *batch(0, 50))
    stop = threading.Event()

    def write() -> None:
        last = 50
        while not stop.is_set():
            log.append(epoch, last, *batch(last, 2))
            last += 2

    writer = threading.Thread(target=write)
    writer.start()
    try:
        paths = [tmp_path / "copies" / f"{number}.db" for number in range(3)]
        before = [len([*log.all_records()])]
        for path in paths:
            assert backup(log._database, path) == path.stat().st_size
            before.append(len([*log.all_records()]))
    finally:
        stop.set()
        writer.join()
    for path, least, most in zip(paths, before, before[1:], strict=False):
        copy = open_database(path, create=False)
        records = list(RunLog(copy, "run-1").all_records())
        effects = RunLog(copy, "run-1").effects_after("x", (0, 0))
        copy.close()
        assert least <= len(records) <= most
        assert len(records) % 2 == 0
        assert [record.sequence for record in records] == list(range(1, len(records) + 1))
        assert [effect.sequence for effect in effects] == list(range(1, len(records) + 1))
    assert sorted(path.name for path in (tmp_path / "copies").iterdir() if path.suffix != ".db") == []


def test_nothing_is_overwritten(log: RunLog, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    path.write_bytes(b"precious")
    with pytest.raises(StorageError, match="exists already"):
        backup(log._database, path)
    assert path.read_bytes() == b"precious"


def test_a_place_that_cannot_be_written(log: RunLog, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="could not be written"):
        backup(log._database, tmp_path / "file" / "copy.db")
