"""Payloads of a simulation by content."""

from __future__ import annotations

from pathlib import Path

from manyhands.simulation.scratch import Scratch


def test_equal_payloads_are_kept_once_and_unneeded_ones_go(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    paths = [scratch.new("update") for _ in range(3)]
    for path, data in zip(paths, (b"same", b"same", b"other"), strict=True):
        path.write_bytes(data)

    first, again, other = (scratch.keep(path) for path in paths)

    assert first == again
    assert scratch.path(first) == paths[0]
    assert not paths[1].exists()
    scratch.keep_only({other.blob})
    assert list(tmp_path.iterdir()) == [paths[2]]


def test_what_was_lent_stays(tmp_path: Path) -> None:
    own = tmp_path / "payloads"
    own.mkdir()
    (tmp_path / "theirs").write_bytes(b"theirs")
    scratch = Scratch(own)

    ref = scratch.lend(tmp_path / "theirs")
    scratch.keep_only(set())

    assert scratch.path(ref).read_bytes() == b"theirs"
