from __future__ import annotations

import os
from pathlib import Path

import pytest

from manyhands.storage import durable
from manyhands.storage.durable import end_with_a_whole_line, write_whole


@pytest.mark.parametrize("block_bytes", [1, 3, 1 << 16])
@pytest.mark.parametrize(
    ("text", "left"),
    [
        (b"", b""),
        (b"one\ntwo\n", b"one\ntwo\n"),
        (b"one\ntwo\n{half", b"one\ntwo\n"),
        (b"one\n\nx", b"one\n\n"),
        (b"nothing but a half", b""),
    ],
)
def test_a_half_line_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, text: bytes, left: bytes
) -> None:
    monkeypatch.setattr(durable, "_BLOCK_BYTES", block_bytes)
    file = tmp_path / "lines"
    file.write_bytes(text)
    end_with_a_whole_line(file)
    assert file.read_bytes() == left


def test_what_is_not_there_stays_so(tmp_path: Path) -> None:
    end_with_a_whole_line(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_whole(file, "old\n")

    def lost(*_: object) -> None:
        raise OSError("no space left")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, lost)
            with pytest.raises(OSError, match="no space"):
                write_whole(file, "new and longer\n")
        assert file.read_text() == "old\n"
    write_whole(file, "new\n")
    assert file.read_bytes() == b"new\n"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
