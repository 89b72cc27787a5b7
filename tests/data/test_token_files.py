from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from manyhands.data.token_files import in_chunks, open_token_file, read_token_files
from manyhands.errors import DataError
from manyhands.plan.language_model import TextSource


def binary(path: Path, ids: list[int]) -> Path:
    np.array(ids, dtype="<u2").tofile(path)
    return path


def test_the_end_of_a_file_is_for_validation(tmp_path: Path) -> None:
    path = binary(tmp_path / "train.bin", list(range(1000)))
    source = TextSource(kind="tokens", path=str(path), validation_share=0.1)
    training, validation = read_token_files(source, 1000, 8)
    assert training.tolist() == list(range(900))
    assert validation.tolist() == list(range(900, 1000))
    cut = source.model_copy(update={"max_tokens": 100, "validation_share": 0.001})
    training, validation = read_token_files(cut, 1000, 8)
    assert (len(training), len(validation)) == (91, 9)  # one sample at least


def test_validation_may_have_its_own_file(tmp_path: Path) -> None:
    training = tmp_path / "train.npy"
    np.save(training, np.arange(50, dtype=np.int64))
    source = TextSource(
        kind="tokens", path=str(training), validation_path=str(binary(tmp_path / "val.bin", list(range(20))))
    )
    parts = read_token_files(source, 100, 8)
    assert [part.tolist() for part in parts] == [list(range(50)), list(range(20))]
    assert np.concatenate(list(in_chunks(parts[0], 50, "a.bin"))).tolist() == list(range(50))


def test_what_is_no_token_file_is_refused(tmp_path: Path) -> None:
    def refused(name: str, data: bytes | np.ndarray, message: str, vocabulary: int = 100) -> None:
        path = tmp_path / name
        if isinstance(data, bytes):
            path.write_bytes(data)
        else:
            np.save(path, data, allow_pickle=True)
        with pytest.raises(DataError, match=message):
            open_token_file(path, vocabulary)

    refused("odd.bin", b"abc", "3 bytes: tokens of uint16 take two each")
    refused("a.txt", b"text", r"text needs task\.text\.kind=files")
    refused("wide.bin", b"abcd", "holds ids up to 65535, and the tokenizer has 70000", 70_000)
    refused("broken.npy", b"no array", "no NumPy array")
    refused("pickled.npy", np.array([{}], dtype=object), "no NumPy array")
    refused("flat.npy", np.zeros((2, 2), dtype=np.int32), "one dimension of integers")
    refused("real.npy", np.zeros(4), "one dimension of integers")
    with pytest.raises(DataError, match=r"nowhere\.bin: No such file"):
        open_token_file(tmp_path / "nowhere.bin", 100)


def test_too_few_tokens_say_what_to_do(tmp_path: Path) -> None:
    source = TextSource(kind="tokens", path=str(binary(tmp_path / "a.bin", [1] * 15)))
    with pytest.raises(DataError, match="6 tokens for training, one sample needs 9"):
        read_token_files(source, 100, 8)
