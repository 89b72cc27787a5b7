"""Who may make shards in a directory, one at a time, and what is left when that fails."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.data.shards import claim
from manyhands.data.shards.claim import PREPARED, RECORD, WANTED, claimed
from manyhands.data.shards.manifest import MAKING
from manyhands.errors import DataError, Interrupted, Refused, StorageError


def begin(
    directory: Path, wanted: dict[str, object], leaves: str | None = None, text: str = "something"
) -> None:
    """Make nothing, or leave that file in .making; and fail."""

    def fail() -> None:
        with claimed(directory, wanted):
            if leaves is not None:
                (directory / MAKING / leaves).write_text(text)
            raise Interrupted

    with pytest.raises(Interrupted):
        fail()


def test_what_ends_well_leaves_the_shards_alone(tmp_path: Path) -> None:
    with claimed(tmp_path / "a" / "b", {}):
        (tmp_path / "a" / "b" / "training-00000.parquet").touch()
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["training-00000.parquet"]


def test_a_failure_leaves_nothing_that_was_not_made(tmp_path: Path) -> None:
    begin(tmp_path / "a", {})
    assert not (tmp_path / "a").exists()
    begin(tmp_path / "a", {}, RECORD, text="")  # the first job's record is there, and empty
    assert not (tmp_path / "a").exists()
    for leaves in (RECORD, PREPARED):
        begin(tmp_path / leaves, {}, leaves)
        assert (tmp_path / leaves / MAKING / leaves).read_text() == "something"


def test_another_wish_is_refused_once_something_is_made(tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    begin(directory, {"task": {"pieces": "KPk"}}, PREPARED)
    begin(directory, {"task": {"pieces": "KPkp"}}, RECORD)  # nothing was made, so this is a new beginning
    assert json.loads((directory / MAKING / WANTED).read_text())["task"] == {"pieces": "KPkp"}
    assert not (directory / MAKING / PREPARED).exists()
    begin(directory, {"task": {"pieces": "KPkp"}})
    assert (directory / MAKING / RECORD).exists()
    with (
        pytest.raises(DataError, match=r"half made, with task\.pieces 'KPkp', and now it is 'KRk'"),
        claimed(directory, {"task": {"pieces": "KRk"}}),
    ):
        pass


def test_a_shard_without_its_line_is_made_too(tmp_path: Path) -> None:
    directory = tmp_path / "a"
    begin(directory, {"rows": 2}, RECORD)
    (directory / MAKING / RECORD).write_text("")
    (directory / "training-00003.parquet").touch()  # cut off between the two
    with pytest.raises(DataError, match="holds shards that are half made"), claimed(directory, {"rows": 1}):
        pass


def test_one_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path / "a", {"seed": 1}):
        for wanted in ({"seed": 1}, {"seed": 2}):
            with (
                pytest.raises(Refused, match=r"in use by process \d+\. Shards are being made there"),
                claimed(tmp_path / "a", wanted),
            ):
                pass
        assert json.loads((tmp_path / "a" / MAKING / WANTED).read_text())["seed"] == 1


def test_another_version_does_not_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(tmp_path / "a", {}, RECORD)
    monkeypatch.setattr(claim, "version", lambda _: "99")
    with (
        pytest.raises(DataError, match=r"with versions\.manyhands '.*', and now it is '99'"),
        claimed(tmp_path / "a", {}),
    ):
        pass


def test_a_disk_that_fails_is_told(tmp_path: Path) -> None:
    def fail() -> None:
        with claimed(tmp_path / "a", {}):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="a: No space left on device; what is made is kept"):
        fail()


def test_places_that_are_not_for_shards(tmp_path: Path, make_shards: Callable[..., Path]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    places: list[tuple[Path, type[Exception], str]] = [
        (make_shards(), DataError, "holds shards already"),
        (tmp_path / "full", DataError, r"is not empty \(notes.txt\): choose a new directory"),
        (
            tmp_path / "full" / "notes.txt" / "new",
            StorageError,
            "cannot write into .*: Not a directory; choose an",
        ),
    ]
    for directory, kind, message in places:
        with pytest.raises(kind, match=message), claimed(directory, {}):
            pass


def test_leftovers_of_the_last_step_are_taken_away(make_shards: Callable[..., Path]) -> None:
    directory = make_shards()
    (directory / MAKING).mkdir()
    with pytest.raises(DataError, match="holds shards already"), claimed(directory, {}):
        pass
    assert not (directory / MAKING).exists()
