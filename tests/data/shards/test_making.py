"""Making shards in processes: the same bytes however many there are and whatever ends them."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.data.shards.making import (
    GROUP_BYTES,
    GROUP_ROWS,
    SHARD_BYTES,
    Making,
    Progress,
    WantedSet,
    row_jobs,
)
from manyhands.data.shards.manifest import MAKING, Column
from manyhands.errors import DataError, StorageError, WorkerError

ROWS = '''
    """Rows of a test, importable in the processes that make them: each is its position; some end them."""
    import os, pathlib, resource, signal
    from dataclasses import dataclass
    import numpy as np
    from manyhands.data.shards.making import RowMaker
    from manyhands.errors import DataError

    @dataclass(frozen=True)
    class Opens:
        ends: str = ""
        once: str = ""
        wanted: object = None

        def __call__(self):
            if self.ends == "disk":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
            return RowMaker(produce=self.make, wanted=self.wanted)

        def make(self, name, positions):
            if 450 in positions and self.ends and (not self.once or not os.path.exists(self.once)):
                if self.once:
                    pathlib.Path(self.once).touch()
                if self.ends == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.ends == "data":
                    raise DataError("row 450 is broken")
                if self.ends == "bug":
                    raise ZeroDivisionError("by nothing")
                if self.ends == "ragged":
                    return {"number": positions[:, None], "tokens": positions}
            return {"number": positions, "tokens": np.stack([positions * k % 50_000 for k in range(8)], axis=1)}
'''
WANTED = {
    name: WantedSet(
        rows=rows,
        columns=(Column(name="number", dtype="int64"), Column(name="tokens", dtype="int64", shape=(8,))),
        group_rows=40,
        shard_rows=100,
    )
    for name, rows in (("training", 750), ("validation", 30))
}


@pytest.fixture
def opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Spawned processes get this one's sys.path."""
    (tmp_path / "rows_of_a_test.py").write_text(textwrap.dedent(ROWS), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    from rows_of_a_test import Opens  # type: ignore[import-not-found]

    return lambda *ends: Opens(*ends, **{"wanted": WANTED})


def begun(directory: Path) -> Making:
    (directory / MAKING).mkdir(parents=True, exist_ok=True)
    making = Making(directory=directory, jobs=row_jobs(WANTED))
    making.find_done()
    return making


def test_the_same_bytes_with_any_number_of_processes(
    tmp_path: Path, opens: Callable[..., Any], digests: Callable[[Path], dict[str, str]]
) -> None:
    told: list[Progress] = []
    one, two = (begun(tmp_path / name) for name in ("one", "two"))
    sets = one.make(opens(), processes=1)
    assert two.make(opens(), processes=2, on_progress=told.append) == sets
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert [file.rows for file in sets["training"]] == [100] * 7 + [50]
    assert [group.rows for group in sets["training"][7].groups] == [40, 10]
    assert (told[0].rows, told[-1].rows, told[-1].total, told[-1].jobs) == (0, 780, 780, 9)
    assert [t.rows for t in told] == sorted(t.rows for t in told)


def test_more_than_the_disk_will_hold_is_told_after_the_first_shard(
    tmp_path: Path, opens: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [10**9, 2_000, 2_000, 2_000, 2_000]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "manyhands.data.shards.making.shutil.disk_usage", lambda _: usage._replace(free=free.pop(0))
    )
    with pytest.raises(
        StorageError, match=r"about 0\.0 GiB more are needed for 580 rows, and 0\.0 GiB are free"
    ):
        begun(tmp_path / "full").make(opens(), processes=1)
    monkeypatch.undo()
    assert len(begun(tmp_path / "full").done) == 2


def test_what_other_processes_have_written_takes_no_room_any_more(
    tmp_path: Path, opens: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, of shards that no record has yet: the rest is there."""
    whole = tmp_path / "whole"
    begun(whole).make(opens(), processes=1)
    place = tmp_path / "disk"
    making = begun(place)
    for file in whole.glob("*.parquet"):
        shutil.copy(file, place / file.name)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("manyhands.data.shards.making.shutil.disk_usage", lambda _: usage._replace(free=0))
    assert len(making.make(opens(), processes=1)["training"]) == 8


def test_more_shards_than_a_directory_should_hold() -> None:
    wanted = replace(WANTED["training"], rows=10**13, shard_rows=65_536)
    with pytest.raises(
        DataError, match=r"10,000,000,000,000 rows of training are 152,587,891 shards .* fewer rows"
    ):
        row_jobs({"training": wanted})


def test_what_is_done_is_kept_when_a_process_is_killed(
    tmp_path: Path, opens: Callable[..., Any], digests: Callable[[Path], dict[str, str]]
) -> None:
    begun(tmp_path / "whole").make(opens(), processes=1)
    making = begun(tmp_path / "cut")
    with pytest.raises(WorkerError, match=r"00004.parquet ended with signal 9; 4 of 9 are made and"):
        making.make(opens("killed", str(tmp_path / "flag")), processes=1)
    place = tmp_path / "cut"
    (place / MAKING / "training-00004.parquet.1.partial").write_bytes(b"half")
    with (place / MAKING / "done.jsonl").open("a") as record:
        record.write('{"job": "training-0')  # a line that was cut
    (place / "training-00001.parquet").write_bytes(b"x" * 1000)  # and a shard that is broken
    again, told = begun(place), []
    assert sorted(again.done) == [f"training-0000{i}.parquet" for i in (0, 2, 3)]
    before = {name: (place / name).stat().st_mtime_ns for name in again.done}
    again.make(opens("killed", str(tmp_path / "flag")), processes=2, on_progress=told.append)
    assert digests(place) == digests(tmp_path / "whole")
    assert {name: (place / name).stat().st_mtime_ns for name in before} == before
    assert (told[0].kept, told[0].rows, told[-1].rows) == (300, 300, 780)
    assert not list((place / MAKING).glob("*.partial"))


@pytest.mark.parametrize(
    ("ends", "kind", "message"),
    [
        ("data", DataError, "row 450 is broken"),
        ("bug", WorkerError, "(?s)making shards failed.*ZeroDivisionError: by nothing"),
        ("ragged", DataError, r"set 'training', rows from 440: column 'number' is int64 \[40, 1\]; expected"),
        ("disk", StorageError, "File too large; 0 of 9 are made and kept: the same command goes on"),
    ],
)
def test_what_ends_a_process_is_told(
    tmp_path: Path, opens: Callable[..., Any], ends: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        begun(tmp_path / "shards").make(opens(ends), processes=1)
    assert not (tmp_path / "shards" / "training-00004.parquet").exists()
    assert not list((tmp_path / "shards" / MAKING).glob("*.partial"))


@pytest.mark.parametrize("row_bytes", [1, 204, 520, 144_000, 10_000_000])
def test_groups_and_shards_are_of_a_sensible_size(row_bytes: int) -> None:
    column = Column(name="a", dtype="uint8", shape=(row_bytes,))
    want = WantedSet.of(1_000_000, (column,))
    assert 1 <= want.group_rows <= GROUP_ROWS
    assert want.group_rows == 1 or want.group_rows * row_bytes <= GROUP_BYTES
    assert want.shard_rows % want.group_rows == 0
    assert want.shard_rows * row_bytes <= max(SHARD_BYTES, row_bytes)
    parts = list(want.files("training"))
    assert parts[0][:2] == ("training-00000.parquet", 0)
    assert parts[-1][2] == 1_000_000
    assert np.unique([stop - start for _, start, stop in parts[:-1]]).size <= 1
