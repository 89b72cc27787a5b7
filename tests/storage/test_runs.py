from __future__ import annotations

import pytest

from manyhands.errors import StorageError
from manyhands.storage.database import Database
from manyhands.storage.runs import create_run, get_run, list_runs


def test_the_signed_bytes_come_back(database: Database) -> None:
    descriptor = '{"lr":"0x1.8p-1","name":"ü"}'.encode()
    assert create_run(database, "b", descriptor, "sig", created_ms=2)
    assert create_run(database, "a", b"{}", "sig", created_ms=2)
    assert create_run(database, "c", b"{}", "sig", created_ms=1)
    assert [run.run_id for run in list_runs(database)] == ["c", "a", "b"]
    run = get_run(database, "b")
    assert (run.descriptor, run.signature, run.created_ms, run.phase) == (descriptor, "sig", 2, "waiting")
    assert (run.lease_epoch, run.lease_owner, run.lease_renewed_ms) == (0, None, None)


def test_a_run_never_changes(database: Database) -> None:
    assert create_run(database, "a", b"{}", "sig")
    assert not create_run(database, "a", b"{}", "sig")
    with pytest.raises(StorageError, match=r"run 'a' exists .* with another plan"):
        create_run(database, "a", b"{ }", "sig")
    assert get_run(database, "a").descriptor == b"{}"


def test_an_unknown_run_names_the_known_ones(database: Database) -> None:
    with pytest.raises(StorageError, match="it holds: none"):
        get_run(database, "a")
    create_run(database, "a", b"{}", "sig")
    with pytest.raises(StorageError, match=r"run 'b' is not in database .*; it holds: a"):
        get_run(database, "b")
