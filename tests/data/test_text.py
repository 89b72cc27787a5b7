from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import pytest

from manyhands.data.text import read_corpus
from manyhands.errors import DataError
from manyhands.plan.tasks import TextSource


def tree(root: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return str(root)


def test_a_directory_is_read_in_the_order_of_relative_paths(tmp_path: Path) -> None:
    files = {f"{name}.txt": name.encode() * 50 for name in ("b", "a/z", "a/b/c", "a-b", "é")}
    files |= {
        "skip.bin": b"x" * 99,
        "__pycache__/x.py": b"x" * 99,
        "site-packages/y.py": b"x" * 99,
        "empty.md": b"",
    }
    corpus = read_corpus(TextSource(path=tree(tmp_path, files), validation_share=0.2))
    names = [d.path for d in (*corpus.training, *corpus.validation)]
    assert sorted(names) == ["a-b.txt", "a/b/c.txt", "a/z.txt", "b.txt", "é.txt"]
    assert [d.path for d in corpus.training] == sorted(d.path for d in corpus.training)
    for document in corpus.training:
        assert document.sha256 == hashlib.sha256(files[document.path]).hexdigest()
        assert document.text.encode() == files[document.path]


def test_the_split_is_by_the_hash_of_the_path(tmp_path: Path) -> None:
    source = tree(tmp_path, {f"f{i:03}.txt": bytes([97 + i % 26]) * 100 for i in range(100)})
    corpus = read_corpus(TextSource(path=source, validation_share=0.1))
    by_hash = sorted((f"f{i:03}.txt" for i in range(100)), key=lambda n: hashlib.sha256(n.encode()).digest())
    assert {d.path for d in corpus.validation} == set(by_hash[:10])
    assert {d.path for d in corpus.training} == set(by_hash[10:])
    (tmp_path / "new.txt").write_bytes(b"n" * 100)
    moved = {d.path for d in read_corpus(TextSource(path=source, validation_share=0.1)).validation}
    assert len(moved & set(by_hash[:10])) >= 9  # a new file hardly moves the others


def test_a_giant_file_does_not_swallow_the_split(tmp_path: Path) -> None:
    sizes = {"giant.txt": b"g" * 9000, "a.txt": b"a" * 300, "b.txt": b"b" * 200}
    corpus = read_corpus(TextSource(path=tree(tmp_path, sizes), validation_share=0.05))
    assert "giant.txt" in {d.path for d in corpus.training}
    corpus = read_corpus(TextSource(path=str(tmp_path), validation_share=0.001))
    assert [d.path for d in corpus.validation] == ["b.txt"]


def test_a_single_file_is_cut_at_the_end_between_characters(tmp_path: Path) -> None:
    text = "añ€😀" * 100
    file = tmp_path / "one.txt"
    file.write_text(text, encoding="utf-8")
    for share in (0.05, 0.0501, 0.051, 0.11):
        corpus = read_corpus(TextSource(path=str(file), validation_share=share))
        assert corpus.training[0].text + corpus.validation[0].text == text
        assert corpus.validation[0].start_byte == corpus.training[0].size_bytes
        assert abs(corpus.validation[0].size_bytes - share * 1000) <= 4


@pytest.mark.parametrize("limit", range(100, 112))
def test_max_bytes_cuts_the_last_file_between_characters(tmp_path: Path, limit: int) -> None:
    files = {"a.txt": b"a" * 60, "b.txt": "€😀".encode() * 20, "c.txt": b"c" * 60}
    corpus = read_corpus(TextSource(path=tree(tmp_path, files), max_bytes=limit, validation_share=0.4))
    assert limit - 3 <= corpus.size_bytes() <= limit
    assert "c.txt" not in {d.path for d in (*corpus.training, *corpus.validation)}


def test_the_standard_library_is_there_and_the_same_twice() -> None:
    one, two = (read_corpus(TextSource(max_bytes=400_000)) for _ in range(2))
    assert one == two
    assert one.size_bytes() == 400_000
    names = [d.path for d in (*one.training, *one.validation)]
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)
    first = one.training[0]
    assert (Path(sysconfig.get_path("stdlib")) / first.path).read_bytes().decode() == first.text
    assert 0.02 < sum(d.size_bytes for d in one.validation) / 400_000 < 0.11


def test_files_that_are_not_utf8_are_left_out_and_named(tmp_path: Path) -> None:
    files = {"a.txt": b"a" * 60, "b.txt": b"b" * 60, "bad.txt": b"\xff\xfe\x00"}
    source = TextSource(path=tree(tmp_path, files), validation_share=0.5, on_broken="skip")
    assert read_corpus(source).broken == ("bad.txt",)
    with pytest.raises(DataError, match=r"bad\.txt is not UTF-8: byte 0 is 0xff.*task\.text\.on_broken=skip"):
        read_corpus(source.model_copy(update={"on_broken": "stop"}))


def test_a_file_of_another_kind_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1\xff\xff")
    with pytest.raises(DataError, match=r"a\.parquet is not UTF-8.*give task\.text\.kind=parquet"):
        read_corpus(TextSource(path=str(tmp_path / "a.parquet")))


def test_validation_may_have_its_own_path(tmp_path: Path) -> None:
    tree(tmp_path, {"train/a.txt": b"a" * 60, "train/b.txt": b"b" * 60, "other.txt": b"c" * 60})
    corpus = read_corpus(
        TextSource(path=str(tmp_path / "train"), validation_path=str(tmp_path / "other.txt"))
    )
    assert [d.path for d in corpus.training] == ["a.txt", "b.txt"]
    assert [d.path for d in corpus.validation] == ["other.txt"]


def test_a_missing_path_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; give a file, a directory or 'stdlib'"):
        read_corpus(TextSource(path=str(tmp_path / "nowhere")))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no \.md, \.py, \.txt files"),
        ({"a.bin": b"x"}, r"no \.md, \.py, \.txt files"),
        ({"a.txt": b"", "b.txt": b""}, "2 files, all of them empty"),
        ({"a.txt": b"\xff\xff"}, "none of 1 files is UTF-8 text, as 'a.txt'"),
        ({"a.txt": b"too small", "b.txt": b"x"}, "at least 50 are needed"),
    ],
)
def test_a_directory_without_text_says_why(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_corpus(TextSource(path=tree(tmp_path, files), on_broken="skip"), minimum_bytes=50)


def test_max_bytes_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="max_bytes is 10: at least 104 bytes"):
        read_corpus(TextSource(max_bytes=10), minimum_bytes=50)
