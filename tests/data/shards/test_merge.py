"""Several directories of shards as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyhands.data.shards.manifest import MAKING, MANIFEST, write_json
from manyhands.data.shards.merge import merge
from manyhands.data.shards.reader import Shards
from manyhands.data.shards.verify import verify
from manyhands.errors import DataError


@pytest.fixture
def chess(make_shards: Callable[..., Path]) -> Callable[..., Path]:
    """Shards that say they are of chess, with other seeds and amounts."""

    def make(at: str, seed: int, first: int, **changes: Any) -> Path:
        directory = make_shards(300, 100, at=at, first=first, seed=seed)
        values = json.loads((directory / MANIFEST).read_text())
        task = {"name": "chess_endgames", "pieces": "KPk", "positions": 300, **changes}
        values["task"] = values["made"][0]["task"] = task
        write_json(directory / MANIFEST, values)
        return directory

    return make


def test_all_rows_in_the_order_of_the_sources(tmp_path: Path, chess: Callable[..., Path]) -> None:
    parts = [chess(f"part-{seed}", seed, seed * 1000) for seed in (1, 2, 3)]
    told: list[tuple[int, int]] = []
    merged = merge(parts, tmp_path / "all", on_progress=lambda done, total: told.append((done, total)))
    shards = Shards.open(tmp_path / "all")
    expected = [seed * 1000 + i for seed in (1, 2, 3) for i in range(300)]
    assert shards.rows(np.arange(900))["number"].tolist() == expected
    assert merged.task["positions"] == 900
    assert [made.seed for made in merged.made] == [1, 2, 3]
    assert verify(tmp_path / "all") == []
    assert (tmp_path / "all" / "training-00003.parquet").samefile(parts[1] / "training-00000.parquet")
    assert told[-1][0] == told[-1][1]
    assert not (tmp_path / "all" / MAKING).exists()


def test_an_evaluation_set_that_all_have_is_kept_once(tmp_path: Path, chess: Callable[..., Path]) -> None:
    one, two, three = chess("one", 1, 0), chess("two", 2, 5000), chess("three", 3, 9000)
    same = one / "validation-00000.parquet"
    (two / "validation-00000.parquet").write_bytes(same.read_bytes())
    values = json.loads((two / MANIFEST).read_text())
    values["sets"]["validation"] = json.loads((one / MANIFEST).read_text())["sets"]["validation"]
    write_json(two / MANIFEST, values)
    merged = merge([one, two, three], tmp_path / "all")
    assert [file.rows for file in merged.sets["validation"].files] == [30, 30]


@pytest.mark.parametrize(
    ("seed", "changes", "message"),
    [
        (
            2,
            {"pieces": "KRk"},
            r"merge: task\.pieces is 'KRk' in .*two and 'KPk' in .*one: only shards of the same",
        ),
        (1, {"positions": 500}, "hold the same rows: they were made from the same source with the same seed"),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, chess: Callable[..., Path], seed: int, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        merge([chess("one", 1, 0), chess("two", seed, 7000, **changes)], tmp_path / "all")
    assert not (tmp_path / "all").exists()


def test_broken_shards_are_not_spread(tmp_path: Path, chess: Callable[..., Path]) -> None:
    one, two = chess("one", 1, 0), chess("two", 2, 5000)
    file = two / "training-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with pytest.raises(DataError, match=r"training-00001.parquet, row group 0 is broken: its bytes are not"):
        merge([one, two], tmp_path / "all")
    file.write_bytes(whole)
    merge([one, two], tmp_path / "all")  # again: what was begun is no hindrance
    assert len(Shards.open(tmp_path / "all")) == 600
    with pytest.raises(DataError, match="holds shards already"):
        merge([one, two], tmp_path / "all")
