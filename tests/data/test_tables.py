from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.data.tables import Faults, Rows, canonical, number_of, read_rows, split_rows, typed_columns
from manyhands.errors import DataError
from manyhands.plan.tables import Table, TableSplit


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(file: str, **more: object) -> Rows:
    return read_rows(Table.parse({"files": [file], **more}), Faults(stop=True))


def test_cells_quotes_blanks_and_missing_values(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", '\ufeffa, b ,c\n1,"x, y",?\n\n 2 ,"two\nlines",NA\n')
    rows = read(file)
    assert rows.columns == ("a", "b", "c")
    assert rows.cells == (("1", "x, y", None), ("2", "two\nlines", None))
    assert rows.places == (f"{file}:2", f"{file}:4")


def test_other_separators_markers_and_files_without_a_header(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "1;-9\n-9;2\n")
    rows = read(file, separator=";", missing=["-9"], column_names=["p", "q"])
    assert (rows.columns, rows.cells) == (("p", "q"), (("1", None), (None, "2")))


def test_files_of_one_table_are_joined_by_the_names_of_their_columns(tmp_path: Path) -> None:
    first = write(tmp_path / "a.csv", "a,b\n1,2\n")
    rows = read_rows(Table(files=(first, write(tmp_path / "b.csv", "b,a\n4,3\n"))), Faults(stop=True))
    assert rows.cells == (("1", "2"), ("3", "4"))
    with pytest.raises(DataError, match=r"c\.csv: the column 'b' is only in one"):
        read_rows(Table(files=(first, write(tmp_path / "c.csv", "a,c\n1,2\n"))), Faults(stop=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("a,b\n", "no rows in"),
        ("a,a\n1,2\n", r"a\.csv:1: the column name 'a' is there twice"),
        ("a,b\n1,2\n3\n", r"a\.csv:3: 1 cells, and there are 2 columns; mend the line"),
        ("a,b\n1,2,3\n", r"a\.csv:2: 3 cells"),
        ('a,b\n1,"2\n', r"a\.csv:2: not readable as CSV"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.csv", text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read(str(tmp_path / "none.csv"))
    (tmp_path / "latin.csv").write_bytes(b"a\n\xe9t\xe9\n")
    with pytest.raises(DataError, match=r"latin\.csv:2: not UTF-8 \(byte 0xe9\): convert the file"):
        read(str(tmp_path / "latin.csv"))
    (tmp_path / "header.csv").write_bytes(b"\xe9t\xe9\n1\n")
    with pytest.raises(DataError, match=r"header\.csv:1: not UTF-8 .*mend the header"):
        read_rows(Table(files=(str(tmp_path / "header.csv"),), on_broken="skip"), Faults(stop=False))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", r"b\.csv is empty"),
        (b"\n\n", r"b\.csv is empty"),
        (None, r"b\.csv cannot be read: No such file"),
        (b"\x89PNG\r\n\x1a\n\x00", r"b\.csv:1: not UTF-8 \(byte 0x89\)"),
        ("a,b\n1,2\n".encode("utf-16"), r"b\.csv:1: not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16-le"), r"b\.csv:1: a NUL byte"),
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_whole_file_that_is_broken_is_left_out_by_policy(
    tmp_path: Path, data: bytes | None, why: str, at: int
) -> None:
    files = [write(tmp_path / "a.csv", "a,b\n1,2\n"), write(tmp_path / "c.csv", "b,a\n4,3\n")]
    files.insert(at, str(tmp_path / "b.csv"))
    if data is not None:
        (tmp_path / "b.csv").write_bytes(data)
    faults = Faults(stop=False)
    rows = read_rows(Table(files=tuple(files), on_broken="skip"), faults)
    assert (rows.columns, rows.cells) == (("a", "b"), (("1", "2"), ("3", "4")))
    assert faults.count == 0
    (told,) = faults.files.values()
    assert re.search(why, told)
    with pytest.raises(DataError, match=why):
        read_rows(Table(files=tuple(files)), Faults(stop=True))
    with pytest.raises(DataError, match=rf"no rows in .*{why}.*give a table with rows"):
        read_rows(Table(files=(files[at],), on_broken="skip"), Faults(stop=False))


def test_the_first_line_of_a_file_without_a_header_is_a_line_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xe9,1\n2,3\n")
    table = Table(files=(str(tmp_path / "a.csv"),), column_names=("a", "b"), on_broken="skip")
    faults = Faults(stop=False)
    assert read_rows(table, faults).cells == (("2", "3"),)
    assert (faults.count, faults.files) == (1, {})


def test_a_line_that_is_not_utf_8_is_skipped_by_policy(tmp_path: Path) -> None:
    (tmp_path / "latin.csv").write_bytes(b"a,b\n1,2\n\xe9t\xe9,3\n4,5\n")
    faults = Faults(stop=False)
    rows = read_rows(Table(files=(str(tmp_path / "latin.csv"),), on_broken="skip"), faults)
    assert rows.cells == (("1", "2"), ("4", "5"))
    assert faults.count == 1


def test_broken_rows_are_skipped_and_counted_by_policy(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'a,b\n1,2\n3\n4,"5"x\n6,x\n7,inf\n8,9\n')
    faults = Faults(stop=False)
    rows = read_rows(Table(files=(file,), on_broken="skip"), faults)
    numbers, _, sound = typed_columns(rows, ["a", "b"], [], faults)
    assert faults.count == 4
    assert [fault.split(": ")[0] for fault in faults.listed] == [f"{file}:{n}" for n in (3, 4, 5, 6)]
    assert "'x', which is no finite number" in faults.listed[2]
    assert numbers["a"][sound].tolist() == [1, 8]
    with pytest.raises(DataError, match=rf"{file}:5: the column 'b' has 'x'"):
        typed_columns(rows, ["a", "b"], [], Faults(stop=True))


def test_typed_columns_keep_what_is_missing() -> None:
    rows = Rows(columns=("n", "c"), cells=((None, "1.0"), ("2e1", None), ("3", "one")), places=("", "", ""))
    numbers, texts, sound = typed_columns(rows, ["n"], ["c"], Faults(stop=True))
    assert np.array_equal(numbers["n"], [np.nan, 20, 3], equal_nan=True)
    assert texts["c"].tolist() == ["1", None, "one"]
    assert sound.all()


def test_categories_that_are_numbers_are_the_same_however_written() -> None:
    assert {canonical(text) for text in ("1", "1.0", "01", "1e0")} == {"1"}
    assert [canonical(text) for text in ("0.5", "NaN", "abc", "-2.0")] == ["0.5", "NaN", "abc", "-2"]
    for text in ("nan", "inf", "1e999", "1_0", "", "x"):
        with pytest.raises(ValueError):
            number_of(text)


def rows_of(texts: list[str]) -> Rows:
    return Rows(columns=("a",), cells=tuple((t,) for t in texts), places=tuple(map(str, range(len(texts)))))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.permutations([str(i) for i in range(60)]), st.integers(0, 3))
def test_the_split_by_hash_depends_on_the_row_and_the_seed_alone(texts: list[str], seed: int) -> None:
    split = split_rows(rows_of(texts + texts[:5]), TableSplit(share=0.4), seed)
    usual = split_rows(rows_of([str(i) for i in range(60)]), TableSplit(share=0.4), seed)
    chosen = {(texts + texts[:5])[i] for i in split.validation}
    assert chosen == {str(i) for i in usual.validation}
    assert not chosen & {(texts + texts[:5])[i] for i in split.training}, "equal rows stay together"


def test_the_share_is_kept_and_seeds_differ() -> None:
    rows = rows_of([str(i) for i in range(5000)])
    first, second = (split_rows(rows, TableSplit(), seed).validation for seed in (1, 2))
    assert 900 < len(first) < 1100
    assert 150 < len(set(first) & set(second)) < 260, "independent: a fifth of a fifth"
    with pytest.raises(DataError, match="none of 1 rows is for"):
        split_rows(rows_of(["1"]), TableSplit(), 1)


def test_a_column_or_a_file_names_the_split(tmp_path: Path) -> None:
    cells = (("p", "train"), ("q", "test"), ("r", "spare"), ("s", "train"))
    rows = Rows(columns=("id", "part"), cells=cells, places=("", "", "", ""))
    split = split_rows(rows, TableSplit(column="part"), 0)
    assert (split.training.tolist(), split.validation.tolist(), split.left_out) == ([0, 3], [1], 1)

    file = write(tmp_path / "s.csv", "id,fold\ns,b\nq,a\nz,a\nr,c\n")
    split = split_rows(
        rows, TableSplit(file=file, key="id", column="fold", training=("a", "c"), validation=("b",)), 0
    )
    assert (split.training.tolist(), split.validation.tolist(), split.left_out) == ([1, 2], [3], 1)
    with pytest.raises(DataError, match=r"for validation: the column 'fold' says \['None', 'a', 'b', 'c'\]"):
        split_rows(rows, TableSplit(file=file, key="id", column="fold", training=("a",)), 0)
    with pytest.raises(DataError, match=r"names the column 'fald'.*Did you mean 'fold'"):
        split_rows(rows, TableSplit(file=file, key="id", column="fald"), 0)
    twice = write(tmp_path / "t.csv", "id,fold\np,a\np,b\n")
    with pytest.raises(DataError, match=r"t\.csv:3: the id 'p' is missing or there twice"):
        split_rows(rows, TableSplit(file=twice, key="id", column="fold"), 0)
