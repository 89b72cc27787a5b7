"""Any rows, in any order, in bounded memory; broken files are named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyhands.data.shards.decoded import DecodedGroups
from manyhands.data.shards.manifest import MANIFEST, read_manifest
from manyhands.data.shards.reader import Shards
from manyhands.errors import DataError


def test_any_rows_in_any_order(make_shards: Callable[..., Path], expected_rows) -> None:  # type: ignore[no-untyped-def]
    shards = Shards.open(make_shards())
    assert (len(shards), shards.samples("validation")) == (1000, 30)
    for indices in (np.array([999, 0, 5, 5, 250, 249]), np.arange(1000), np.empty(0, dtype=np.int64)):
        rows, wanted = shards.rows(indices), expected_rows(indices)
        assert list(rows) == list(wanted)
        for name, values in wanted.items():
            assert rows[name].dtype == values.dtype, name
            assert (rows[name] == values).all(), name
    assert shards.rows(np.array([29]), "validation")["number"].tolist() == [29]


def test_rows_can_be_changed_without_changing_the_shards(make_shards: Callable[..., Path]) -> None:
    shards = Shards.open(make_shards())
    shards.rows(np.array([3]))["tokens"][:] = 0
    assert shards.rows(np.array([3]))["tokens"].any()


@given(st.lists(st.lists(st.integers(0, 999), max_size=60), max_size=8), st.integers(1, 5))
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_few_slots_give_the_same_rows(kept_shards: Path, requests: list[list[int]], slots: int) -> None:
    """Fewer than a request needs, too; what is read ahead changes nothing."""
    part = read_manifest(kept_shards).sets["training"]
    groups = DecodedGroups(kept_shards, part, slots)
    for request in requests:
        indices = np.array(request, dtype=np.int64)
        assert groups.gather(indices)["number"].tolist() == request
        groups.move(request[:2] and [0], [r % len(groups.rows) for r in request[:3]])
    groups.close()


def test_memory_does_not_grow_with_the_shards(make_shards: Callable[..., Path]) -> None:
    directory = make_shards(rows=4000, shard=1000, group=50)
    groups = DecodedGroups(directory, read_manifest(directory).sets["training"], 3)
    groups.gather(np.arange(4000))
    assert {len(values) for values in groups._slab.values()} == {3 * 50}
    assert len(groups._held) == 3
    groups.close()


def test_each_group_is_decompressed_once_in_an_epoch(
    make_shards: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = Shards.open(make_shards(rows=6000, shard=1000, group=25))  # 240 groups, 64 slots
    decoded: list[int] = []
    decode = DecodedGroups._decode

    def counted(self: DecodedGroups, number: int) -> object:
        decoded.append(number)
        return decode(self, number)

    monkeypatch.setattr(DecodedGroups, "_decode", counted)
    seen = []
    for start in range(0, 6000, 48):
        indices = shards.order(np.arange(start, min(start + 48, 6000)), 1, 0)
        seen += shards.rows(indices)["number"].tolist()
    shards.close()
    assert sorted(seen) == list(range(6000))
    of_epoch = decoded[:240]  # then the first window of the next one
    assert sorted(of_epoch) == list(range(240))
    assert len(decoded) <= 240 + 32


def test_outside(make_shards: Callable[..., Path]) -> None:
    shards = Shards.open(make_shards())
    with pytest.raises(DataError, match=r"rows 3\.\.1000 do not lie within the 1000 rows of 'training'"):
        shards.rows(np.array([3, 1000]))
    with pytest.raises(DataError, match="have no set 'test'; they have training, validation"):
        shards.rows(np.array([0]), "test")


def test_missing_and_cut_files_are_found_when_opened(make_shards: Callable[..., Path]) -> None:
    directory = make_shards()
    file = directory / "training-00002.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"training-00002.parquet has [\d,]+ bytes, and the manifest says"):
        Shards.open(directory)
    file.unlink()
    with pytest.raises(DataError, match=r"training-00002.parquet: No such file.*data\.on_broken=skip"):
        Shards.open(directory)
    left = Shards.open(directory, ["training-00002.parquet"])
    assert len(left) == 750
    assert left.rows(np.array([500]))["number"].tolist() == [750]


def test_all_broken(make_shards: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="all shards of the set 'validation' are broken"):
        Shards.open(make_shards(), ["validation-00000.parquet"])


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7))
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_a_flipped_bit_never_gives_other_rows(kept_shards: Path, where: float, bit: int) -> None:
    """It is found when it is read, or it changed nothing."""
    file = kept_shards / "training-00001.parquet"
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[int(where * len(whole))] ^= 1 << bit
    file.write_bytes(broken)
    try:
        rows = Shards.open(kept_shards).rows(np.arange(250, 500))["number"].tolist()
        assert rows == list(range(250, 500))
    except DataError as error:
        if "training-00001.parquet, row group" not in str(error):
            raise
    finally:
        file.write_bytes(whole)


def test_what_is_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such directory; `manyhands shards pack` makes one"):
        Shards.open(tmp_path / "none")
    (tmp_path / "old").mkdir()
    with pytest.raises(DataError, match=r"no manifest\.json there"):
        Shards.open(tmp_path / "old")
    (tmp_path / "old" / "a.zst").touch()
    with pytest.raises(DataError, match="import them with `manyhands shards import"):
        Shards.open(tmp_path / "old")
    (tmp_path / "old" / ".making").mkdir()
    with pytest.raises(DataError, match="are not whole: they are being made"):
        Shards.open(tmp_path / "old")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "'version' is 2"),
        (lambda m: m.update(extra=1), "unknown key 'extra'"),
        (lambda m: m["sets"].pop("training"), "there is no set 'training'"),
        (lambda m: m["sets"]["training"]["files"][0].update(name="../../etc/x"), "name"),
        (lambda m: m["sets"]["training"]["files"][0].update(rows=7), "do not have its 7 rows"),
        (lambda m: m["sets"]["training"]["files"][0]["stored"].pop("mask"), "stores"),
    ],
)
def test_a_manifest_is_checked(make_shards, change, message: str) -> None:  # type: ignore[no-untyped-def]
    directory = make_shards()
    values = json.loads((directory / MANIFEST).read_text())
    change(values)
    (directory / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match=message):
        Shards.open(directory)
    (directory / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is broken"):
        Shards.open(directory)
