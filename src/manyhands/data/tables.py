"""Tables from CSV files: lines to rows, cells to typed columns, rows to training and validation.

Every row remembers its file and line, so that whatever is found wrong with it later can say where. Broken
rows and files go through one place, `Faults`: by policy the first one stops, or all are skipped and counted.
Rows keep the order of the files, so the same files and settings give the same table on every machine.
"""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manyhands.config import did_you_mean
from manyhands.errors import DataError
from manyhands.plan.tables import Table, TableSplit

Numbers = npt.NDArray[np.float64]
Texts = npt.NDArray[np.object_]
Int64s = npt.NDArray[np.int64]

DEFAULT_SHARE = 0.2
LISTED_FAULTS = 100
"""So many broken rows are named in the record; all of them are counted."""
NAMED_FAULTS = 3
"""So many are named in a message or warning; more are in the record."""


@dataclass(slots=True, kw_only=True)
class Faults:
    """What was broken: lines, the first of which are listed, and whole files with what is wrong with each. `stop`:
    the first fault raises DataError instead of being kept.
    """

    stop: bool
    count: int = 0
    listed: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    def found(self, place: str, why: str) -> None:
        """`place` is file:line."""
        if self.stop:
            raise DataError(
                f"{place}: {why}; mend the line, or leave such lines out with task.table.on_broken=skip"
            )
        self.count += 1
        if len(self.listed) < LISTED_FAULTS:
            self.listed.append(f"{place}: {why}")

    def file_found(self, file: str, error: DataError) -> None:
        """`error` says what is wrong with the whole file, and names it."""
        if self.stop:
            raise error
        self.files[file] = str(error)


class BrokenFile(DataError):
    """Nothing of a table file can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Cells as text, None where a value is missing; `places` (file:line) goes with `cells`, row by row."""

    columns: tuple[str, ...]
    cells: tuple[tuple[str | None, ...], ...]
    places: tuple[str, ...]

    def position(self, column: str, setting: str) -> int:
        """Where `column` is. Raises DataError that names the `setting` which asked for it."""
        if column not in self.columns:
            raise DataError(
                f"{setting} names the column {column!r}, which the table does not have."
                f"{did_you_mean(column, self.columns)}"
            )
        return self.columns.index(column)


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Row numbers, ascending; `left_out` rows are in neither."""

    training: Int64s
    validation: Int64s
    left_out: int


# ------------------------------------------------------------------------------ reading
def read_rows(table: Table, faults: Faults) -> Rows:
    """All rows of `table.files`. A line that is no row goes to `faults`, and so does a file that is missing, empty or
    has no readable header. Raises DataError for files without rows, or with other columns than the first one.
    """
    columns: tuple[str, ...] = table.column_names
    _refuse_twice(columns, "task.table.column_names")
    cells: list[tuple[str | None, ...]] = []
    places: list[str] = []
    first = table.files[0]
    for file in table.files:
        try:
            part = _rows_of(file, table, faults)
        except BrokenFile as error:
            faults.file_found(file, error)
            continue
        if not columns:
            columns, first = part.columns, file
        order = _order(part.columns, columns, file, first)
        cells += [tuple(row[i] for i in order) for row in part.cells]
        places += part.places
    if not cells:
        why = "; ".join([f"{faults.count} broken lines", *list(faults.files.values())[:NAMED_FAULTS]])
        raise DataError(f"no rows in {', '.join(table.files)} ({why}): give a table with rows")
    return Rows(columns=columns, cells=tuple(cells), places=tuple(places))


def _rows_of(file: str, table: Table, faults: Faults) -> Rows:
    """Of one file, in the order of its own columns. Raises BrokenFile."""
    lines = _lines(file, table, faults)
    names = table.column_names
    if not names:
        place, names = next(lines, ("", ()))
        if not names:
            raise BrokenFile(f"table file {file} is empty: a header and rows were expected")
        if any("\0" in name for name in names):
            raise BrokenFile(f"{place}: a NUL byte, which no text has; mend the header")
        _refuse_twice(names, place)
    cells: list[tuple[str | None, ...]] = []
    places: list[str] = []
    for place, row in lines:
        if len(row) != len(names):
            faults.found(place, f"{len(row)} cells, and there are {len(names)} columns")
            continue
        cells.append(tuple(None if cell in table.missing else cell for cell in row))
        places.append(place)
    return Rows(columns=names, cells=tuple(cells), places=tuple(places))


def _lines(file: str, table: Table, faults: Faults) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(file:line, cells without surrounding blanks) of each line that is not empty."""
    path, header = Path(file).expanduser(), not table.column_names
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter=table.separator, strict=True)
            while True:
                place = f"{path}:{reader.line_num + 1}"
                try:
                    row = next(reader, None)
                    "".join(row or ()).encode()
                except (csv.Error, UnicodeEncodeError) as error:
                    broken = _broken_line(error)
                    if header:  # what the next line means is not known without it
                        raise BrokenFile(f"{place}: {broken}; mend the header") from None
                    faults.found(place, broken)
                    continue
                if row is None:
                    return
                if row:
                    header = False
                    yield place, tuple(cell.strip() for cell in row)
    except OSError as error:
        raise BrokenFile(f"table file {path} cannot be read: {error.strerror}; check the path") from error


def _broken_line(error: csv.Error | UnicodeEncodeError) -> str:
    if isinstance(error, csv.Error):
        return f"not readable as CSV ({error})"
    byte = ord(error.object[error.start]) & 0xFF  # surrogateescape keeps it so
    return f"not UTF-8 (byte 0x{byte:02x}): convert the file"


def _refuse_twice(names: Sequence[str], place: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{place}: the column name {twice[0]!r} is there twice; give each column its own name"
        )


def _order(names: Sequence[str], columns: Sequence[str], file: str, first: str) -> list[int]:
    """Where each of `columns` is in this file."""
    odd = sorted(set(names) ^ set(columns))
    if odd:
        raise DataError(
            f"table file {file}: the column {odd[0]!r} is only in one of this file and {first}; the files of one "
            "table have the same columns"
        )
    return [names.index(column) for column in columns]


# ------------------------------------------------------------------------------ cells
def number_of(text: str) -> float:
    """The finite number that `text` is. Raises ValueError."""
    value = float(text)
    if not math.isfinite(value) or "_" in text:
        raise ValueError(f"{text!r} is not a finite number")
    return value


def canonical(text: str) -> str:
    """A category's name: numbers are written alike, so that 1, 1.0 and 01 are one category."""
    try:
        value = number_of(text)
    except ValueError:
        return text
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def typed_columns(
    rows: Rows, numeric: Sequence[str], categorical: Sequence[str], faults: Faults
) -> tuple[dict[str, Numbers], dict[str, Texts], npt.NDArray[np.bool_]]:
    """Numeric columns (NaN: missing), categorical ones (None: missing), and which rows are sound; all [rows].

    A cell that is no number makes its row broken: it goes to `faults`, once.
    """
    numbers = {name: np.full(len(rows.cells), np.nan) for name in numeric}
    texts: dict[str, Texts] = {name: np.full(len(rows.cells), None, dtype=object) for name in categorical}
    sound = np.ones(len(rows.cells), dtype=np.bool_)
    at_numbers = [(rows.columns.index(name), name) for name in numeric]
    at_texts = [(rows.columns.index(name), name) for name in categorical]
    for i, cells in enumerate(rows.cells):
        for position, name in at_texts:
            cell = cells[position]
            texts[name][i] = None if cell is None else canonical(cell)
        for position, name in at_numbers:
            cell = cells[position]
            try:
                numbers[name][i] = np.nan if cell is None else number_of(cell)
            except ValueError:
                faults.found(
                    rows.places[i],
                    f"the column {name!r} has {cell!r}, which is no finite number (a column of names belongs in "
                    "task.features.categorical, a sign for missing values in task.table.missing)",
                )
                sound[i] = False
                break
    return numbers, texts, sound


# ------------------------------------------------------------------------------ training and validation
def split_rows(rows: Rows, split: TableSplit, seed: int) -> Split:
    """Which rows are for training and which for validation. Raises DataError if one of them gets none."""
    if split.column is None:
        share = DEFAULT_SHARE if split.share is None else split.share
        limit = int(share * 2**64)
        chosen = np.array([_row_hash(cells, seed) < limit for cells in rows.cells])
        training, validation = np.flatnonzero(~chosen), np.flatnonzero(chosen)
        hint = "give more rows, or another task.split.share"
    else:
        names = np.array(_named_splits(rows, split, split.column), dtype=object)
        training = np.flatnonzero(np.isin(names, split.training))
        validation = np.flatnonzero(np.isin(names, split.validation))
        hint = f"the column {split.column!r} says {sorted({str(name) for name in names})[:8]}"
    for found, part in ((training, "training"), (validation, "validation")):
        if not len(found):
            raise DataError(f"none of {len(rows.cells)} rows is for {part}: {hint}")
    return Split(
        training=training, validation=validation, left_out=len(rows.cells) - len(training) - len(validation)
    )


def _row_hash(cells: tuple[str | None, ...], seed: int) -> int:
    """64 bits that depend on the seed and the row alone: not on its place, nor on the other rows."""
    digest = hashlib.blake2b(repr((seed, cells)).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _named_splits(rows: Rows, split: TableSplit, column: str) -> list[str | None]:
    """What `column` says of each row; None where nothing does."""
    if split.file is None or split.key is None:
        position = rows.position(column, "task.split.column")
        return [cells[position] for cells in rows.cells]
    names = _names_by_key(split.file, split.key, column)
    position = rows.position(split.key, "task.split.key")
    return [names.get(cells[position] or "") for cells in rows.cells]


def _names_by_key(file: str, key: str, column: str) -> Mapping[str, str | None]:
    rows = read_rows(Table(files=(file,)), Faults(stop=True))
    at_key = rows.position(key, "task.split.key")
    at_name = rows.position(column, "task.split.column")
    names: dict[str, str | None] = {}
    for cells, place in zip(rows.cells, rows.places, strict=True):
        name = cells[at_key]
        if name is None or name in names:
            raise DataError(f"{place}: the {key} {name!r} is missing or there twice: each row needs its own")
        names[name] = cells[at_name]
    return names
