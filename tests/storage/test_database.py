"""Opening: settings of a connection, migrations, and each fault in words."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from manyhands.errors import StorageError
from manyhands.storage.database import Database, open_database
from manyhands.storage.runs import create_run, list_runs
from manyhands.storage.tables import metadata, runs


def test_every_connection_is_durable_and_checks_keys(database: Database) -> None:
    with database.read() as first, database.read() as second:
        for connection in (first, second):
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            values = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
            assert values == ["wal", 2, 1, 5000]


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        assert set(sa.inspect(connection).get_table_names()) == {*metadata.tables, "alembic_version"}


def test_opens_again_by_path_and_by_url(database: Database) -> None:
    create_run(database, "run-1", b"{}", "s")
    for where in (str(database.path), f"sqlite:///{database.path}"):
        again = open_database(where)
        assert [run.run_id for run in list_runs(again)] == ["run-1"]
        again.close()


def test_two_threads_may_create_at_once(tmp_path: Path) -> None:
    opened: list[Database] = []
    faults: list[Exception] = []

    def create() -> None:
        try:
            opened.append(open_database(tmp_path / "deep" / "server.db"))
        except StorageError as error:
            faults.append(error)

    threads = [threading.Thread(target=create) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(opened) == 4
    for database in opened:
        database.close()


def test_a_write_that_raises_leaves_nothing(database: Database) -> None:
    row = {"run_id": "x", "descriptor": "", "signature": "", "created_ms": 1, "phase": "w"}

    def fail_in_the_middle() -> None:
        with database.write() as connection:
            connection.execute(runs.insert(), [row | {"outbox_from": 0, "lease_epoch": 0}])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_in_the_middle()
    assert list_runs(database) == []


@pytest.mark.parametrize(
    "content", [b"PK\3\4 not a database at all", b"SQLite format 3\0" + b"garbage" * 700]
)
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"is not a (manyhands )?database"):
        open_database(path)
    assert path.read_bytes() == content


def test_a_database_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    with sqlite3.connect(path) as raw:
        raw.execute("CREATE TABLE songs (name)")
    raw.close()
    with pytest.raises(StorageError, match=r"is not a manyhands database: it holds other tables \(songs\)"):
        open_database(path)


def test_a_newer_schema(database: Database) -> None:
    with database.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StorageError, match=r"schema 9999.*newer manyhands; upgrade"):
        open_database(database.path)


def test_places_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a directory"):
        open_database(tmp_path)
    with pytest.raises(StorageError, match="does not exist"):
        open_database(tmp_path / "no.db", create=False)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot be opened"):
        open_database(tmp_path / "file" / "x.db")
    with pytest.raises(StorageError, match="kind 'postgresql': only SQLite"):
        open_database("postgresql://user:secret@host/db")
    with pytest.raises(StorageError, match="not a database URL"):
        open_database("://server.db")
    with pytest.raises(StorageError, match="kind 'what'"):
        open_database("what://server.db")
    with pytest.raises(StorageError, match="in memory"):
        open_database("sqlite:///:memory:")


def test_a_secret_in_a_url_is_not_shown() -> None:
    with pytest.raises(StorageError) as caught:
        open_database("postgresql://user:secret@host/db")
    assert "secret" not in str(caught.value)


def test_read_only(database: Database) -> None:
    again = open_database(f"sqlite:///file:{database.path}?mode=ro&uri=true")
    with pytest.raises(StorageError, match=r"cannot be written: check the permissions"):
        create_run(again, "run-1", b"{}", "s")
    again.close()


def test_a_full_disk_keeps_what_was_there(database: Database) -> None:
    create_run(database, "run-1", b"{}", "s")
    with database.write() as connection:  # SQLite's own limit: the same SQLITE_FULL as from a full disk
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match=r"the disk is full: free some space"):
        create_run(database, "run-2", b"{" + b" " * 100_000 + b"}", "s")
    assert [run.run_id for run in list_runs(database)] == ["run-1"]


def test_locked_by_another_process(database: Database) -> None:
    other = sqlite3.connect(database.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    impatient = open_database(database.path, busy_timeout_s=0.05)
    with pytest.raises(StorageError, match="is locked by another process"):
        create_run(impatient, "run-1", b"{}", "s")
    assert list_runs(impatient) == []  # readers do not wait for writers
    other.execute("ROLLBACK")
    other.close()
    assert create_run(impatient, "run-1", b"{}", "s")
    impatient.close()


def test_damage_is_named(database: Database) -> None:
    for number in range(50):
        create_run(database, f"run-{number}", b"x" * 5000, "s")
    path = database.path
    database.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(os.urandom(size // 2))
    reopened = open_database(path)
    with pytest.raises(StorageError, match="is damaged: restore it from a backup"):
        list_runs(reopened)
    reopened.close()
