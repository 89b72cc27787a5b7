"""One shard: rows come back as they were, the same rows are the same bytes, and other tools can read them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from manyhands.data.shards.decoded import read_group
from manyhands.data.shards.manifest import narrowed
from manyhands.data.shards.writer import check_rows, columns_of, write_shard
from manyhands.errors import DataError


def test_rows_come_back_as_they_were(tmp_path: Path, expected_rows) -> None:  # type: ignore[no-untyped-def]
    groups = [expected_rows(np.arange(0, 100)), expected_rows(np.arange(100, 130))]
    columns = columns_of(groups[0], "test")
    file = write_shard(tmp_path / "a.parquet", columns, groups)
    for number, group in enumerate(groups):
        read = read_group(tmp_path / "a.parquet", columns, dict(file.stored), number)
        for name, values in group.items():
            assert (read[name] == values).all(), name
            assert read[name].shape == values.shape, name
    assert (file.rows, [group.rows for group in file.groups]) == (130, [100, 30])
    assert file.size_bytes == (tmp_path / "a.parquet").stat().st_size


def test_integers_take_as_few_bytes_as_they_need(tmp_path: Path, expected_rows) -> None:  # type: ignore[no-untyped-def]
    groups = [expected_rows(np.arange(0, 10)), expected_rows(np.arange(300, 310))]
    stored = write_shard(tmp_path / "a.parquet", columns_of(groups[0], "test"), groups).stored
    assert stored == {
        "number": "uint16", "tokens": "uint8", "small": "int16", "mask": "bool", "one_mask": "bool",
        "grid": "float32",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 255]), "uint8"),
        (np.array([-1, 127]), "int8"),
        (np.array([-1, 4000]), "int16"),
        (np.array([0, 65_535]), "uint16"),
        (np.array([-(2**40)]), "int64"),
        (np.array([-1, 255], dtype=np.int16), "int16"),
        (np.array([2**63], dtype=np.uint64), "uint64"),
        (np.array([], dtype=np.int64), "int64"),
        (np.array([1.0], dtype=np.float64), "float64"),
    ],
)
def test_narrowed(values: np.ndarray, expected: str) -> None:
    assert narrowed(values).name == expected


def test_the_same_rows_are_the_same_bytes(tmp_path: Path, expected_rows) -> None:  # type: ignore[no-untyped-def]
    groups = [expected_rows(np.arange(50))]
    columns = columns_of(groups[0], "test")
    one, two = (write_shard(tmp_path / name, columns, groups) for name in ("one", "two"))
    assert one.sha256 == two.sha256


def test_row_groups_are_named_by_their_bytes(tmp_path: Path, expected_rows) -> None:  # type: ignore[no-untyped-def]
    groups = [expected_rows(np.arange(a, a + 40)) for a in (0, 40, 80)]
    file = write_shard(tmp_path / "a.parquet", columns_of(groups[0], "test"), groups)
    data = (tmp_path / "a.parquet").read_bytes()
    end = 4  # behind the magic bytes
    for group in file.groups:
        assert group.start == end
        end = group.start + group.size_bytes
        assert zlib.crc32(data[group.start : end]) == group.crc32


def test_other_readers_find_types_and_shapes(tmp_path: Path, expected_rows) -> None:  # type: ignore[no-untyped-def]
    rows = expected_rows(np.arange(20))
    write_shard(tmp_path / "a.parquet", columns_of(rows, "test"), [rows])
    table = pq.read_table(tmp_path / "a.parquet")
    field = table.schema.field("grid")
    assert field.metadata == {b"dtype": b"float32", b"shape": b"2,3", b"stored": b"float32"}
    assert table.column("number").to_pylist() == list(range(20))
    assert np.frombuffer(table.column("grid")[3].as_py(), "<f4").tolist() == rows["grid"][3].ravel().tolist()


def test_what_shards_do_not_hold(expected_rows) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="task: column 'text' is object, which shards do not hold"):
        columns_of({"text": np.array(["a"], dtype=object)}, "task")
    with pytest.raises(DataError, match=r"'empty' has rows of the shape \(0,\)"):
        columns_of({"empty": np.zeros((1, 0))}, "task")
    rows = expected_rows(np.arange(4))
    columns = columns_of(rows, "task")
    check_rows(rows, columns, 4, "task")
    with pytest.raises(
        DataError, match=r"'tokens' is int64 \[4, 4\]; expected int64 \[4, 5\]: .* fixed size"
    ):
        check_rows({**rows, "tokens": rows["tokens"][:, :4]}, columns, 4, "task")
    with pytest.raises(DataError, match="columns number"):
        check_rows({"number": rows["number"]}, columns, 4, "task")
