"""Opening the database: engine, transactions, migrations, and what the database's errors mean.

Reads and writes are separate doors. `read()` is a consistent view that never waits for a writer (WAL).
`write()` is one transaction, begun IMMEDIATE so that nobody changes what it has read, and on the disk when
the block ends (synchronous=FULL). Inside one process writers queue on a lock, which is fair and does not poll
as SQLite's busy handler does; between processes SQLite waits `busy_timeout_s`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from manyhands.errors import StorageError

DEFAULT_BUSY_TIMEOUT_S = 10.0
_SQLITE_MAGIC = b"SQLite format 3\0"


class Database:
    """An open database of the current schema. Thread-safe; close it once, when nobody uses it any more."""

    def __init__(self, engine: sa.Engine, path: Path) -> None:
        self.engine = engine
        self.path = path
        self._writing_engine = engine.execution_options(manyhands_writes=True)
        self._writer = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A consistent view of the database as it was at the first statement. Only for reading."""
        with translated(self.path), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """One transaction: durable when the block ends, undone when it raises. Raises StorageError."""
        with self._writer, translated(self.path), self._writing_engine.begin() as connection:
            yield connection

    def close(self) -> None:
        self.engine.dispose()


def open_database(
    where: str | Path, *, busy_timeout_s: float = DEFAULT_BUSY_TIMEOUT_S, create: bool = True
) -> Database:
    """Open, create or migrate the database at a path or a `sqlite:///` URL.

    create=False refuses a file that is not there. Raises StorageError for a file that is no database of
    manyhands, one written by a newer program, one that cannot be written, or one that another process holds
    locked for longer than `busy_timeout_s`.
    """
    url, path = _resolve(where)
    _check_place(path, create)
    engine = sa.create_engine(url, connect_args={"check_same_thread": False}, max_overflow=-1)
    _set_up_connections(engine, path, busy_timeout_s)
    database = Database(engine, path)
    try:
        _migrate(database)
    except BaseException:
        engine.dispose()
        raise
    return database


# ------------------------------------------------------------------------------------------- where it is
def _resolve(where: str | Path) -> tuple[sa.URL, Path]:
    if isinstance(where, Path) or "://" not in where:
        path = Path(where).expanduser().absolute()
        return sa.URL.create("sqlite", database=str(path)), path
    try:
        url = sa.make_url(where)
    except (ArgumentError, NoSuchModuleError) as error:
        raise StorageError(
            f"'{where}' is not a database URL ({error}): expected a path or sqlite:///PATH."
        ) from None
    if url.get_backend_name() != "sqlite":
        raise StorageError(
            f"database '{url.render_as_string()}' is of kind '{url.get_backend_name()}': only SQLite is "
            "supported, as a path or sqlite:///PATH."
        )
    name = (url.database or "").removeprefix("file:").partition("?")[0]
    if name in ("", ":memory:"):
        raise StorageError(f"database '{where}' is in memory and would be lost: expected the path of a file.")
    return url, Path(name).absolute()


def _check_place(path: Path, create: bool) -> None:
    """The faults that SQLite reports as 'unable to open database file', in words."""
    if path.is_dir():
        raise StorageError(
            f"database '{path}' is a directory: expected a file, for example {path / 'server.db'}."
        )
    try:
        if path.exists():
            with path.open("rb") as file:
                head = file.read(len(_SQLITE_MAGIC))
            if head not in (b"", _SQLITE_MAGIC):
                raise _not_ours(path, "its first bytes are not those of an SQLite file")
        elif create:
            path.parent.mkdir(parents=True, exist_ok=True)
        else:
            raise StorageError(
                f"database '{path}' does not exist: check the path (--data-dir, if the server was started "
                "with one), or start a server there first."
            )
    except OSError as error:
        raise StorageError(
            f"database '{path}' cannot be opened ({error}): check path and permissions."
        ) from error


# ------------------------------------------------------------------------------------------- connections
def _set_up_connections(engine: sa.Engine, path: Path, busy_timeout_s: float) -> None:
    def connected(raw: sqlite3.Connection, _record: object) -> None:
        raw.isolation_level = None  # BEGIN is ours (below), not guessed by the driver
        cursor = raw.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(busy_timeout_s * 1000)}")
        mode = cursor.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise StorageError(
                f"database '{path}' cannot use a write-ahead log (it stays in mode '{mode}'): "
                "put it on a local disk."
            )
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    def begun(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("manyhands_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    sa.event.listen(engine, "connect", connected)
    sa.event.listen(engine, "begin", begun)


# ------------------------------------------------------------------------------------------- migrations
def _migrate(database: Database) -> None:
    """Bring the schema to this program's revision in one transaction; two programs that open at once take
    turns."""
    # Alembic costs a quarter of a second to import; only who opens a database pays.
    from alembic import command
    from alembic.config import Config
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    script = ScriptDirectory.from_config(config)
    with database.read() as connection:
        if MigrationContext.configure(connection).get_current_revision() == script.get_current_head():
            return
    with database.write() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        known = {revision.revision for revision in script.walk_revisions()}
        if current is not None and current not in known:
            raise StorageError(
                f"database '{database.path}' has schema {current}, which this program does not know (it "
                f"knows up to {script.get_current_head()}): it was written by a newer "
                "manyhands; upgrade this one."
            )
        strangers = sorted(sa.inspect(connection).get_table_names()) if current is None else []
        if strangers:
            raise _not_ours(database.path, f"it holds other tables ({', '.join(strangers[:3])})")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


# ------------------------------------------------------------------------------------------- errors
def _not_ours(path: Path, why: str) -> StorageError:
    return StorageError(
        f"'{path}' is not a manyhands database: {why}. Give another path; nothing was changed."
    )


_MEANINGS: dict[str, str] = {
    "SQLITE_NOTADB": "is not a database: give another path, or restore it from a backup",
    "SQLITE_CORRUPT": "is damaged: restore it from a backup (`manyhands server backup` makes them)",
    "SQLITE_READONLY": "cannot be written: check the permissions of the file and of its directory",
    "SQLITE_PERM": "cannot be opened for lack of permission: check who owns the file and its directory",
    "SQLITE_CANTOPEN": "cannot be opened: check the path and the permissions of its directory",
    "SQLITE_FULL": "could not be written, the disk is full: free some space; nothing half-written was kept",
    "SQLITE_IOERR": "met an input/output error: check the disk and its free space",
    "SQLITE_BUSY": "is locked by another process: stop the other one, or wait until it is done",
    "SQLITE_LOCKED": "is locked by another process: stop the other one, or wait until it is done",
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of the database and its driver into StorageError with the path and the next step."""
    try:
        yield
    except DBAPIError as error:
        raise explained(error.orig or error, path) from error
    except sqlite3.Error as error:
        raise explained(error, path) from error
    except SQLAlchemyError as error:
        raise StorageError(f"database '{path}': {error}") from error


def explained(error: Any, path: Path) -> StorageError:
    """What an error of SQLite means for who runs the program."""
    name = str(
        getattr(error, "sqlite_errorname", "")
    )  # extended codes: SQLITE_IOERR_WRITE is an SQLITE_IOERR
    for code, meaning in _MEANINGS.items():
        if name == code or name.startswith(code + "_"):
            return StorageError(f"database '{path}' {meaning} ({name}: {error}).")
    return StorageError(f"database '{path}': {error}")
