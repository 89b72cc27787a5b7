"""TPG files as shards: all their positions, those that are held out for validation, and what is no TPG file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from manyhands.data.shards.manifest import read_manifest
from manyhands.data.shards.reader import Shards
from manyhands.errors import DataError
from manyhands.plan.schema import Data, Plan
from manyhands.plan.tasks import ChessEndgamesTask
from manyhands.tasks.chess_endgames.task import is_held_out
from manyhands.tasks.chess_endgames.tpg import RECORD_BYTES, TPG_RECORD, policy_moves, read_tpg
from manyhands.tasks.chess_endgames.truth import open_source
from manyhands.tasks.protocol import VALIDATION
from manyhands.tasks.registry import family_of
from manyhands.tasks.tpg_shards import import_tpg


def write_tpg(file: Path, pieces: str, count: int, first: int) -> None:
    """Positions with three men and their truth, as the programs write them that people have such files from."""
    rows = open_source(pieces, None).make(np.arange(first, first + count), seed=5)
    records = np.zeros(count, dtype=TPG_RECORD)
    numbers = {move: number for number, move in enumerate(policy_moves().tolist())}
    for record, squares, value, moves, best in zip(
        records, rows["squares"], rows["value"], rows["moves"], rows["best"], strict=True
    ):
        record["results"][:] = np.eye(3)[2 - value]
        for square, piece in enumerate(squares.tolist()):
            record["squares"][square, piece] = 100
            record["squares"][square, 121 + square // 8] = 100
            record["squares"][square, 129 + square % 8] = 100
        listed = [numbers[knight_is_plain(move)] for move in moves[moves >= 0].tolist()]
        probabilities = best[: len(listed)] / best.sum()
        record["policy_moves"][:] = (listed + [listed[-1]] * 92)[:92]
        record["probabilities"][: len(listed)] = probabilities
    assert len(records.tobytes()) == count * RECORD_BYTES
    with pa.output_stream(str(file), compression="zstd") as stream:
        stream.write(records.tobytes())


def knight_is_plain(move: int) -> int:
    return move - 4096 if move >> 12 == 1 else move


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tpg")
    write_tpg(directory / "b.zst", "KPk", 300, 0)
    write_tpg(directory / "a.zst", "KRk", 200, 1000)
    return directory


def test_every_position_once(tmp_path: Path, files: Path) -> None:
    manifest = import_tpg([files], tmp_path / "shards", processes=2)
    assert manifest.task["pieces"] == "KPk,KRk"
    assert list(manifest.made[0].sources) == [str(files / "a.zst"), str(files / "b.zst")]
    shards = Shards.open(tmp_path / "shards")
    wanted = [block for name in ("a.zst", "b.zst") for block in read_tpg(files / name)]
    all_rows = {name: np.concatenate([block[name] for block in wanted]) for name in wanted[0]}
    held_out = is_held_out(all_rows["squares"], 0.125)
    for name, mine in (("training", ~held_out), ("validation", held_out)):
        rows = shards.rows(np.arange(shards.samples(name)), name)
        assert list(rows) == list(all_rows)
        assert all((rows[column] == values[mine]).all() for column, values in all_rows.items())
    assert 30 < shards.samples("validation") < 100

    plan = Plan(
        data=Data(shards=str(tmp_path / "shards")),
        task=ChessEndgamesTask(**read_manifest(tmp_path / "shards").task),
    )
    family = family_of(plan)
    family.prepare(plan, tmp_path / "materials")
    task = family.open(plan, tmp_path / "materials")
    model = task.build_model()
    loss = task.loss(model, task.batch(np.arange(16)))
    loss.mean.backward()
    assert loss.mean.isfinite()
    metrics = task.metrics(VALIDATION)  # outcomes of moves and distances are not known
    metrics.add(model, task.batch(np.arange(16), VALIDATION))
    assert set(metrics.values()) == {"value_accuracy"}


def test_what_is_no_tpg_file(tmp_path: Path, files: Path) -> None:
    (tmp_path / "text.zst").write_text("no zstd")
    with pytest.raises(DataError, match=r"cannot read .*text\.zst as zstd"):
        import_tpg([tmp_path / "text.zst"], tmp_path / "a")
    with pa.output_stream(str(tmp_path / "odd.zst"), compression="zstd") as stream:
        stream.write(b"\0" * (RECORD_BYTES + 1))
    with pytest.raises(
        DataError, match=r"odd\.zst holds 9,251 bytes, which is no whole number of records of 9,250"
    ):
        import_tpg([files / "a.zst", tmp_path / "odd.zst"], tmp_path / "a")
    with pytest.raises(DataError, match=r"no \.zst file there"):
        import_tpg([tmp_path / "nothing"], tmp_path / "a")
    with pa.output_stream(str(tmp_path / "zeros.zst"), compression="zstd") as stream:
        stream.write(b"\0" * RECORD_BYTES)
    with pytest.raises(DataError, match=r"zeros\.zst: record 0"):
        import_tpg([tmp_path / "zeros.zst"], tmp_path / "a", processes=1)
