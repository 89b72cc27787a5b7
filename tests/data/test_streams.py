"""Parquet and `datasets`, from files made on the spot; nothing is fetched."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from manyhands.data.streams import Broken, Side, streams
from manyhands.errors import DataError, MissingExtra
from manyhands.plan.language_model import TextSource

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

TEXTS = [f"document number {i}" for i in range(200)]


def table(path: Path, **columns: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def read(source: TextSource) -> tuple[list[tuple[Side, str]], Broken]:
    broken = Broken()
    return [item for documents in streams(source, broken) for item in documents], broken


def parquet(path: Path, **settings: Any) -> TextSource:
    return TextSource(kind="parquet", path=str(path), **settings)


def test_rows_come_in_order_and_their_content_decides_the_side(tmp_path: Path) -> None:
    table(tmp_path / "b.parquet", text=TEXTS[100:])
    table(tmp_path / "a.parquet", text=TEXTS[:100], other=[1] * 100)
    found, broken = read(parquet(tmp_path, validation_share=0.2))
    assert [text for _, text in found] == TEXTS
    kept = {text for side, text in found if side == "validation"}
    assert 20 < len(kept) < 60
    assert broken == Broken()
    again, _ = read(
        parquet(table(tmp_path / "c" / "twice.parquet", text=TEXTS[::-1] * 2), validation_share=0.2)
    )
    assert {text for side, text in again if side == "validation"} == kept, "copies are on the same side"


def test_validation_may_have_its_own_file_and_documents_are_capped(tmp_path: Path) -> None:
    table(tmp_path / "train.parquet", body=TEXTS)
    table(tmp_path / "other.parquet", body=["x", "y", "z"])
    own = str(tmp_path / "other.parquet")
    found, _ = read(parquet(tmp_path / "train.parquet", validation_path=own, column="body", max_documents=2))
    assert found == [
        ("training", TEXTS[0]),
        ("training", TEXTS[1]),
        ("validation", "x"),
        ("validation", "y"),
    ]


def test_what_is_broken_stops_or_is_skipped_and_counted(tmp_path: Path) -> None:
    table(tmp_path / "a.parquet", text=["one", None, "two", ""])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    source = parquet(tmp_path, validation_share=1e-9)
    with pytest.raises(DataError, match=r"a\.parquet:1: 'text' is NoneType.*on_broken=skip"):
        read(source)
    found, broken = read(source.model_copy(update={"on_broken": "skip"}))
    assert [text for _, text in found] == ["one", "two"]
    assert (broken.count, broken.named) == (2, ["a.parquet:1", "b.parquet"])
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"b\.parquet is broken"):
        read(source)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "txt"}, r"no column 'txt'.*Did you mean 'text'\?"),
        ({"column": "number"}, "column 'number' is int64, expected text"),
    ],
)
def test_a_column_that_cannot_be(tmp_path: Path, settings: dict[str, str], message: str) -> None:
    path = table(tmp_path / "a.parquet", text=["one"], number=[1])
    with pytest.raises(DataError, match=message):
        read(parquet(path, **settings))


def test_no_parquet_file_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere.parquet"):
        with pytest.raises(DataError, match="no Parquet file there"):
            read(parquet(path))


@pytest.mark.parametrize(("kind", "package"), [("parquet", "pyarrow"), ("hub", "datasets")])
def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch, kind: Any, package: str) -> None:
    for module in (package, "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=rf"task\.text\.kind={kind}.*pip install 'manyhands\[hub\]'"):
        read(TextSource(kind=kind, path="lab/texts"))


def test_a_data_set_is_streamed_by_split_and_column(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    data = tmp_path / "set"
    table(data / "train.parquet", text=TEXTS)
    table(data / "validation.parquet", text=["x", "y"])
    source = TextSource(kind="hub", path=str(data), validation_split="validation", max_documents=3)
    found, _ = read(source)
    assert found == [
        *(("training", text) for text in TEXTS[:3]),
        *(("validation", text) for text in ("x", "y")),
    ]
    with pytest.raises(DataError, match=r"no column 'txt'.*Did you mean 'text'\?"):
        read(source.model_copy(update={"column": "txt"}))
    with pytest.raises(DataError, match=r"split 'test': .*task\.text\.split"):
        read(source.model_copy(update={"split": "test"}))
    with pytest.raises(DataError, match=r"nowhere.*Without a network, fetch it where there is one"):
        read(source.model_copy(update={"path": str(tmp_path / "nowhere")}))
