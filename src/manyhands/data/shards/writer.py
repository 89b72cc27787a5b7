"""One shard: a Parquet file whose columns are rows of a fixed number of bytes.

A row of a column is FIXED_LEN_BYTE_ARRAY, or a plain number where it is a single one, so that decoding is
decompressing and copying: measured on one core with endgame positions of 204 bytes, 2.8 million rows/s at zstd
level 3, against 0.3 million as lists. dtype and shape stand in each field's metadata, for readers that have no
manifest. Integers are stored in as few bytes as the values of this file need. Pages carry checksums.

The same rows give the same bytes: nothing in the file depends on the time, the machine or the number of threads.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from manyhands.config.extras import optional
from manyhands.data.shards.manifest import Column, Group, ShardFile, narrowed
from manyhands.errors import DataError
from manyhands.storage.durable import sync

Rows = Mapping[str, npt.NDArray[Any]]

EXTRA: Final = "shards"
COMPRESSION_LEVEL: Final = 3
"""Of zstd: 1 makes files as large, 9 saves 6% at five times the work."""
KINDS: Final = frozenset(
    ("bool", "float16", "float32", "float64", *(f"{s}int{n}" for s in ("", "u") for n in (8, 16, 32, 64)))
)


def arrow() -> ModuleType:
    """pyarrow, imported when shards are first used. Raises MissingExtra."""
    return optional("pyarrow", extra=EXTRA, option="shards")


def parquet() -> ModuleType:
    return optional("pyarrow.parquet", extra=EXTRA, option="shards")


def columns_of(rows: Rows, what: str) -> tuple[Column, ...]:
    """The columns of these rows, in their order. Raises DataError for a dtype that shards do not hold."""
    for name, values in rows.items():
        if values.dtype.name not in KINDS:
            raise DataError(
                f"{what}: column {name!r} is {values.dtype}, which shards do not hold; expected one of "
                f"{', '.join(sorted(KINDS))}"
            )
        if 0 in values.shape[1:]:
            raise DataError(
                f"{what}: column {name!r} has rows of the shape {values.shape[1:]}: nothing to hold"
            )
    return tuple(Column(name=n, dtype=v.dtype.name, shape=v.shape[1:]) for n, v in rows.items())


def check_rows(rows: Rows, columns: Sequence[Column], count: int, what: str) -> None:
    """Raises DataError for rows that are not of these columns: each row of a set has the same form."""
    if list(rows) != [column.name for column in columns]:
        raise DataError(f"{what}: columns {', '.join(rows)}; expected {', '.join(c.name for c in columns)}")
    for column in columns:
        values = rows[column.name]
        if values.dtype.name != column.dtype or values.shape != (count, *column.shape):
            raise DataError(
                f"{what}: column {column.name!r} is {values.dtype.name} {list(values.shape)}; expected "
                f"{column.dtype} {[count, *column.shape]}: shards hold rows of a fixed size, so pad them to one"
            )


def write_shard(path: Path, columns: Sequence[Column], groups: Iterable[Rows]) -> ShardFile:
    """Write `groups`, each a row group, to `path`, durably; what the manifest says of the file.

    Held in memory meanwhile, in their narrowest form. Raises OSError, such as for a full disk.
    """
    held = [{name: values.astype(narrowed(values), copy=False) for name, values in g.items()} for g in groups]
    stored = {c.name: np.result_type(*(group[c.name].dtype for group in held)) for c in columns}
    pa, pq = arrow(), parquet()
    schema = pa.schema([_field(pa, column, stored[column.name]) for column in columns])
    with (
        path.open("wb") as file,
        pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            compression_level=COMPRESSION_LEVEL,
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=True,
        ) as writer,
    ):
        for group in held:
            writer.write_table(_table(pa, schema, columns, group, stored), row_group_size=2**31)
    sync(path)
    return _described(path, pq, stored)


def _field(pa: ModuleType, column: Column, stored: np.dtype[Any]) -> Any:
    about = {"dtype": column.dtype, "shape": ",".join(map(str, column.shape)), "stored": stored.name}
    return pa.field(column.name, _type(pa, column, stored), nullable=False, metadata=about)


def _type(pa: ModuleType, column: Column, stored: np.dtype[Any]) -> Any:
    if not column.shape:
        return pa.from_numpy_dtype(np.uint8 if stored == np.bool_ else stored)
    return pa.binary(int(stored.itemsize * np.prod(column.shape, dtype=np.int64)))


def _table(
    pa: ModuleType, schema: Any, columns: Sequence[Column], rows: Rows, stored: Mapping[str, np.dtype[Any]]
) -> Any:
    arrays = []
    for column, field in zip(columns, schema, strict=True):
        values = np.ascontiguousarray(rows[column.name].astype(_little(stored[column.name]), copy=False))
        if not column.shape:
            arrays.append(pa.array(values.view(np.uint8) if values.dtype == np.bool_ else values))
            continue
        arrays.append(
            pa.FixedSizeBinaryArray.from_buffers(field.type, len(values), [None, pa.py_buffer(values)])
        )
    return pa.Table.from_arrays(arrays, schema=schema)


def _little(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return dtype.newbyteorder("<")


def _described(path: Path, pq: ModuleType, stored: Mapping[str, np.dtype[Any]]) -> ShardFile:
    """Read back once: hashes, and where the row groups are."""
    meta = pq.read_metadata(path)
    groups = []
    with path.open("rb") as file:
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            parts = [group.column(i) for i in range(group.num_columns)]
            start = min(part.data_page_offset for part in parts)
            size = sum(part.total_compressed_size for part in parts)
            groups.append(
                Group(rows=group.num_rows, start=start, size_bytes=size, crc32=crc32_of(file, start, size))
            )
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardFile(
        name=path.name,
        rows=meta.num_rows,
        size_bytes=path.stat().st_size,
        sha256=digest,
        stored={name: dtype.name for name, dtype in stored.items()},
        groups=tuple(groups),
    )


def crc32_of(file: BinaryIO, start: int, size: int) -> int:
    """Of these bytes of a file, or of what is left of them."""
    file.seek(start)
    value = 0
    while size > 0 and (block := file.read(min(size, 1 << 20))):
        value = zlib.crc32(block, value)
        size -= len(block)
    return value
