"""Documents from Parquet files and from data sets of the package `datasets`, one after the other, never all at once.

Read once, by whoever prepares the run. Order is that of the source, so the same source gives the same documents.
Which of them are for validation is decided by each document's own hash: equal documents are on one side, and a
document that is added moves no other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from manyhands.config import did_you_mean
from manyhands.config.extras import optional
from manyhands.errors import DataError
from manyhands.plan.language_model import TextSource

Side = Literal["training", "validation"]

EXTRA: Final = "hub"
NAMED_BROKEN: Final = 100
"""So many broken documents are named in the record; all are counted."""

_ROWS = 1024  # of a Parquet file, at a time


@dataclass(slots=True)
class Broken:
    """What was left out of a stream so far: all of it counted, the first NAMED_BROKEN of it named."""

    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, where: str) -> None:
        self.count += 1
        if len(self.named) < NAMED_BROKEN:
            self.named.append(where)


def streams(source: TextSource, broken: Broken) -> tuple[Iterator[tuple[Side, str]], ...]:
    """The documents with their side of the split: one stream of both, or one of each where validation has its own
    source. `source.max_documents` holds for each stream.

    Reading raises DataError for a source that is missing or broken, a column that is not there, and for a document
    that is no text unless `source.on_broken` is "skip"; MissingExtra where the package that reads it is not
    installed.
    """
    if source.kind == "parquet":
        own = source.validation_path
        rows = _parquet(source, source.path, broken)
        others = None if own is None else _parquet(source, own, broken)
    else:
        own = source.validation_split
        rows = _hub(source, source.split)
        others = None if own is None else _hub(source, own)
    if others is None:
        return (_documents(source, rows, broken, None),)
    return _documents(source, rows, broken, "training"), _documents(source, others, broken, "validation")


def _documents(
    source: TextSource, rows: Iterable[tuple[str, object]], broken: Broken, side: Side | None
) -> Iterator[tuple[Side, str]]:
    """`side`: of all of them; None: as their hashes say."""
    documents = 0
    for where, text in rows:
        if isinstance(text, str):
            if text:
                yield side or ("validation" if _kept(text, source.validation_share) else "training"), text
                documents += 1
                if documents == source.max_documents:
                    return
        elif source.on_broken == "stop":
            raise DataError(
                f"{where}: {source.column!r} is {type(text).__name__}, expected text: mend the data, or leave such "
                "documents out with task.text.on_broken=skip"
            )
        else:
            broken.add(where)


def _kept(text: str, share: float) -> bool:
    """Whether a document is for validation: the first 64 bits of its hash, as a share of all."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# ------------------------------------------------------------------------------ Parquet
def _parquet(source: TextSource, path: str, broken: Broken) -> Iterator[tuple[str, object]]:
    """(file:row, value) of every row of the column."""
    parquet = optional("pyarrow.parquet", extra=EXTRA, option="task.text.kind=parquet")
    arrow = optional("pyarrow", extra=EXTRA, option="task.text.kind=parquet")
    for file in _parquet_files(Path(path).expanduser()):
        try:
            with parquet.ParquetFile(file) as table:
                _check_column(table.schema_arrow, source.column, file, arrow)
                row = 0
                for batch in table.iter_batches(batch_size=_ROWS, columns=[source.column]):
                    for value in batch.column(0).to_pylist():
                        yield f"{file.name}:{row}", value
                        row += 1
        except (OSError, arrow.ArrowException, UnicodeDecodeError) as error:
            if source.on_broken == "stop":
                raise DataError(
                    f"Parquet file {file} is broken: {_first_line(error)}; fetch it again, or leave it out with "
                    "task.text.on_broken=skip"
                ) from error
            broken.add(file.name)


def _parquet_files(path: Path) -> list[Path]:
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(
            f"task.text.path {str(path)!r}: no Parquet file there; give a .parquet file, or a directory of them"
        )
    return files


def _check_column(schema: Any, column: str, file: Path, arrow: Any) -> None:
    if column not in schema.names:
        raise DataError(
            f"Parquet file {file} has no column {column!r} (task.text.column).{did_you_mean(column, schema.names)}"
        )
    kind = schema.field(column).type
    if not (arrow.types.is_string(kind) or arrow.types.is_large_string(kind)):
        raise DataError(
            f"Parquet file {file}: column {column!r} is {kind}, expected text: choose another with task.text.column"
        )


# ------------------------------------------------------------------------------ datasets
def _hub(source: TextSource, split: str) -> Iterator[tuple[str, object]]:
    """(data set/split:row, value), streamed: only what is read is fetched."""
    datasets = optional("datasets", extra=EXTRA, option="task.text.kind=hub")
    name = source.path if source.subset is None else f"{source.path} ({source.subset})"
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=split, streaming=True)
        for row, values in enumerate(_values(rows, source.column, name)):
            yield f"{name}/{split}:{row}", values
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data set {name}, split {split!r}: {_first_line(error)}. Without a network, fetch it where there is "
            "one, and give its directory as task.text.path; else look at task.text.subset and task.text.split"
        ) from error


def _values(rows: Iterable[Mapping[str, object]], column: str, name: str) -> Iterator[object]:
    for values in rows:
        if column not in values:
            raise DataError(
                f"data set {name} has no column {column!r} (task.text.column).{did_you_mean(column, values)}"
            )
        yield values[column]


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else text[:300] + " ...") or type(error).__name__
