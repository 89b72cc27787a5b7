"""Every byte that changed is found, and where it can be said, its row group."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyhands.data.shards.manifest import MANIFEST, MATERIALS, read_manifest, write_json
from manyhands.data.shards.verify import Fault, sha256_of, verify
from manyhands.errors import DataError


def test_sound_shards(make_shards: Callable[..., Path]) -> None:
    told: list[tuple[int, int]] = []
    directory = make_shards()
    assert verify(directory, on_progress=lambda done, total: told.append((done, total))) == []
    assert told[-1][0] == told[-1][1] == sum(f.stat().st_size for f in directory.glob("*.parquet"))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_flipped_bit_is_found_where_it_is(kept_shards: Path, where: float, bit: int) -> None:
    file = kept_shards / "training-00001.parquet"
    whole = file.read_bytes()
    at = int(where * len(whole))
    broken = bytearray(whole)
    broken[at] ^= 1 << bit
    groups = read_manifest(kept_shards).sets["training"].files[1].groups
    inside = [i for i, g in enumerate(groups) if g.start <= at < g.start + g.size_bytes]
    try:
        file.write_bytes(broken)
        (fault,) = verify(kept_shards)
    finally:
        file.write_bytes(whole)
    assert (fault.file, fault.group) == (file.name, inside[0] if inside else None)


def test_files_that_are_cut_or_gone(make_shards: Callable[..., Path]) -> None:
    directory = make_shards()
    cut, gone = directory / "training-00000.parquet", directory / "validation-00000.parquet"
    groups = read_manifest(directory).sets["training"].files[0].groups
    cut.write_bytes(cut.read_bytes()[: groups[2].start + 5])
    gone.unlink()
    faults = verify(directory)
    assert [(fault.file, fault.group) for fault in faults] == [
        (cut.name, 2),
        (cut.name, 3),
        (gone.name, None),
    ]
    cut.write_bytes(b"")
    assert [fault.group for fault in verify(directory)][:4] == [0, 1, 2, 3]


def test_materials(make_shards: Callable[..., Path]) -> None:
    directory = make_shards()
    (directory / MATERIALS).mkdir()
    (directory / MATERIALS / "a.json").write_text("{}")
    values = json.loads((directory / MANIFEST).read_text())
    values["materials"] = {"a.json": {"size_bytes": 2, "sha256": sha256_of(directory / MATERIALS / "a.json")}}
    write_json(directory / MANIFEST, values)
    assert verify(directory) == []
    (directory / MATERIALS / "a.json").write_text("[]")
    assert verify(directory) == [Fault(file="materials/a.json", group=None, what="its hash is another")]
    (directory / MATERIALS / "a.json").unlink()
    assert verify(directory) == [Fault(file="materials/a.json", group=None, what="it is missing")]


def test_bytes_as_the_manifest_says_that_are_no_such_rows(make_shards: Callable[..., Path]) -> None:
    """A manifest of another making: hashes right, columns wrong."""
    directory = make_shards()
    values = json.loads((directory / MANIFEST).read_text())
    values["sets"]["validation"]["columns"][0]["shape"] = [3]
    write_json(directory / MANIFEST, values)
    (fault,) = verify(directory)
    assert (fault.file, fault.group) == ("validation-00000.parquet", 0)
    assert "bytes a row" in fault.what


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such directory"):
        verify(tmp_path / "none")
