from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from manyhands.data.tokens import open_tokens, sample_count, width_of, windows, write_tokens
from manyhands.errors import DataError


@pytest.mark.parametrize(("vocabulary", "dtype"), [(256, "<u2"), (65_536, "<u2"), (65_537, "<u4")])
def test_what_was_written_is_read_back(tmp_path: Path, vocabulary: int, dtype: str) -> None:
    path = tmp_path / "a.tokens"
    ids = [0, 1, 255, vocabulary - 1]
    assert write_tokens(path, [ids[:2], [], np.array(ids[2:])], vocabulary) == 4
    tokens = open_tokens(path)
    assert tokens.dtype == np.dtype(dtype)
    assert tokens.tolist() == ids
    assert path.stat().st_size == 32 + 4 * width_of(vocabulary)


def test_bytes_on_disk_are_little_endian(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_tokens(path, [[0x0102, 3]], 1000)
    assert (
        path.read_bytes()
        == b"MHTOKEN1" + bytes.fromhex("02000000e80300000200000000000000") + bytes(8) + b"\2\1\3\0"
    )


@pytest.mark.parametrize("ids", [[-1], [10]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(DataError, match="vocabulary of 10"):
        write_tokens(tmp_path / "a.tokens", [ids], 10)


def test_windows_overlap_by_one_token(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_tokens(path, [range(25)], 100)
    tokens = open_tokens(path)
    assert sample_count(25, 8) == 3
    rows = windows(tokens, np.array([2, 0]), 8)
    assert rows.dtype == np.int64
    assert rows.tolist() == [list(range(16, 25)), list(range(9))]
    assert sample_count(24, 8) == 2
    assert sample_count(0, 8) == 0


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_is_refused(tmp_path: Path, index: int) -> None:
    path = tmp_path / "a.tokens"
    write_tokens(path, [range(25)], 100)
    with pytest.raises(DataError, match="3 samples"):
        windows(open_tokens(path), np.array([index]), 8)


def test_a_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_tokens(path, [range(25)], 100)
    whole = path.read_bytes()
    for broken, message in (
        (whole[:-1], "81 bytes"),
        (whole[:10], "no token file"),
        (b"x" * 90, "no token file"),
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=message):
            open_tokens(path)
    path.unlink()
    with pytest.raises(DataError, match="prepare the task again"):
        open_tokens(path)


def test_writing_that_was_interrupted_leaves_no_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"

    def chunks() -> object:
        yield [1, 2, 3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tokens(path, chunks(), 10)  # type: ignore[arg-type]
    with pytest.raises(DataError):
        open_tokens(path)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tokens"
    write_tokens(path, [], 10)
    with pytest.raises(DataError, match="holds no tokens"):
        open_tokens(path)
