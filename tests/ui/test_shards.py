"""`manyhands shards ...`, `gen_tpg` and `train --shards` by the installed command, as people type them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.data.shards.making import Progress
from manyhands.errors import PlanError
from manyhands.plan.tasks import ChessEndgamesTask
from manyhands.ui.main import run
from manyhands.ui.plans import configuration_from
from manyhands.ui.shard_progress import rows_text

Run = Callable[..., subprocess.CompletedProcess[str]]
MANYHANDS = str(Path(sys.executable).with_name("manyhands"))


@pytest.fixture(scope="module")
def endgames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of king and pawn against king, which need no tables."""
    place = tmp_path_factory.mktemp("endgames")
    subprocess.run(
        [MANYHANDS, "gen_tpg", "--pieces=KPk", "--num_pos=2048", "--tpg_dir=shards", "--rows-per-shard=512",
         "task.validation_positions=100", "--processes=1"],
        cwd=place, check=True, capture_output=True, env={**os.environ, "MANYHANDS_HOME": str(place / "home")},
    )  # fmt: skip
    return place / "shards"


def test_what_was_made_is_shown(manyhands: Run, endgames: Path) -> None:
    shown = json.loads(manyhands("shards", "info", str(endgames), "--format", "json").stdout)
    assert (shown["task"]["pieces"], shown["task"]["positions"], shown["seed"]) == ("KPk", 2048, 1337)
    assert {name: part["rows"] for name, part in shown["sets"].items()} == {
        "training": 2048,
        "validation": 100,
    }
    assert [c["name"] for c in shown["sets"]["training"]["columns"]][:3] == ["squares", "en_passant", "value"]
    assert shown["made"][0]["command"].startswith("manyhands gen_tpg --pieces=KPk --num_pos=2048")
    table = manyhands("shards", "info", str(endgames)).stdout
    assert "pieces: KPk" in table
    assert "training    2,048      4" in table


def test_broken_shards_are_named(manyhands: Run, endgames: Path, tmp_path: Path) -> None:
    sound = manyhands("shards", "verify", str(endgames))
    assert (sound.returncode, sound.stdout) == (0, f"{endgames}: every byte is as it was written\n")
    broken = tmp_path / "broken"
    shutil.copytree(endgames, broken)
    for name, at in (("training-00001.parquet", 100), ("training-00003.parquet", -1)):
        data = bytearray((broken / name).read_bytes())
        data[at] ^= 1
        (broken / name).write_bytes(data)
    (broken / "validation-00000.parquet").unlink()
    told = manyhands("shards", "verify", str(broken), "--format", "json")
    assert told.returncode == 4
    faults = json.loads(told.stdout)
    assert [(fault["file"], fault["group"]) for fault in faults] == [
        ("training-00001.parquet", 0), ("training-00003.parquet", None), ("validation-00000.parquet", None),
    ]  # fmt: skip
    assert "3 files of" in told.stderr
    assert "data.on_broken=skip" in told.stderr


def test_a_training_needs_no_other_word_than_the_directory(manyhands: Run, endgames: Path) -> None:
    composed = manyhands("train", "--tpg-dir", str(endgames), "task.model.layers=2", "--cfg", "job").stdout
    for line in (
        "name: endgames",
        "  pieces: KPk",
        "  positions: 2048",
        "    layers: 2",
        f"  shards: {endgames}",
    ):
        assert f"{line}\n" in composed
    short = ("local.steps=2", "rounds.total=1", "schedule.warmup_steps=1", "evaluation.max_batches=1")
    trained = manyhands(
        "train", "--shards", str(endgames), "--pieces=kpK", *short, "exec.threads=1", timeout=200
    )
    assert trained.returncode == 0, trained.stderr
    assert "finished at step 2" in trained.stdout


def test_other_shards_than_those_of_the_training_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though its own are still in place; and what is kept of the training is as it was."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path / "home"))
    for name, seed in (("own", 3), ("others", 4)):
        words = ("task=tabular", "task.table.generated_rows=400", "task.hidden_sizes=[4]", f"seed={seed}")
        assert run(["shards", "pack", "--out", name, "--processes=1", *words]) == 0
    short = ("local.steps=2", "rounds.total=1", "evaluation.max_batches=1", "--logs", "none")
    assert run(["train", "--shards", "own", "run=mine", *short]) == 0
    plan = tmp_path / "home" / "runs" / "mine" / "plan.yaml"
    before = plan.read_text(encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for directory, why in (("others", "are others than when"), ("empty", "")):
        for command in (("eval", "mine"), ("train", "--resume", "mine")):
            capsys.readouterr()
            assert run([*command, "--shards", directory]) == 4
            told = capsys.readouterr().err
            assert str(tmp_path / directory) in told
            assert why in told
    assert plan.read_text(encoding="utf-8") == before
    assert run(["eval", "mine"]) == 0
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    assert run(["eval", "mine", "--shards", "copy"]) == 0
    file = tmp_path / "own" / "validation-00000.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[200] ^= 255
    for damage, why in (
        (lambda: file.write_bytes(damaged), "row group 0, is broken"),
        (file.unlink, "No such"),
    ):
        damage()
        capsys.readouterr()
        assert run(["eval", "mine"]) == 4
        told = capsys.readouterr().err
        assert why in told
        assert "put that file back, or say where a whole copy of the shards is (--shards DIR)" in told
        assert "on_broken" not in told


def test_words_that_contradict_the_shards(manyhands: Run, endgames: Path) -> None:
    pieces = manyhands("train", "--tpg-dir", str(endgames), "--pieces=KRk")
    assert pieces.returncode == 2
    assert f"--pieces KRk contradicts the shards in {endgames}, which are of the pieces KPk" in pieces.stderr
    share = manyhands("train", "--shards", str(endgames), "task.held_out=0.5")
    assert share.returncode == 3
    assert "'task.held_out' is 0.5, and the shards in" in share.stderr
    assert "were made with 0.125" in share.stderr
    nothing = manyhands("train", "--shards", "nowhere")
    assert nothing.returncode == 4
    assert "there is no such directory" in nothing.stderr


def test_the_task_of_shards_lies_between_a_plan_and_the_words(endgames: Path, tmp_path: Path) -> None:
    """A plan file's own settings stay, and contradict; of a config only the model stays."""
    file = tmp_path / "plan.yaml"
    file.write_text("task: {name: chess_endgames, model: {width: 16}}\nlocal: {batch_size: 7}\n")
    over = configuration_from(str(file), ["task.model.layers=1"], shards=str(endgames)).plan
    assert isinstance(over.task, ChessEndgamesTask)
    assert (over.task.pieces, over.task.positions, over.local.batch_size) == ("KPk", 2048, 7)
    assert (over.task.model.width, over.task.model.layers) == (16, 1)
    file.write_text("task: {name: chess_endgames, pieces: KRk}\n")
    with pytest.raises(
        PlanError, match=r"'task\.pieces' is 'KRk', and the shards in .* were made with 'KPk'"
    ):
        configuration_from(str(file), [], shards=str(endgames))
    named = configuration_from(None, [], "endgames", shards=str(endgames)).plan  # it is for KPkp
    assert isinstance(named.task, ChessEndgamesTask)
    assert (named.task.pieces, named.task.model.tokens) == ("KPk", "pieces")
    other = configuration_from(None, [], "demo", shards=str(endgames)).plan
    assert (other.name, other.task.name) == ("demo", "chess_endgames")


def test_what_cannot_be_made(manyhands: Run, endgames: Path, tmp_path: Path) -> None:
    few = manyhands("gen_tpg", "--pieces=KPk", "--num_pos=100", "--tpg_dir=new")
    assert few.returncode == 2
    assert "--num-pos 100: too few for a shard, which has at least 1,024 positions" in few.stderr
    (tmp_path / "file").touch()
    unwritable = manyhands("gen_tpg", "--pieces=KPk", "--num_pos=2000", "--tpg_dir=file/new")
    assert unwritable.returncode == 9
    assert "cannot write into" in unwritable.stderr
    other = manyhands("gen_tpg", "--pieces=KRk", "--num_pos=2000", f"--tpg_dir={endgames}")
    assert other.returncode == 4
    assert "holds shards already" in other.stderr
    (tmp_path / "tables").mkdir()
    missing = manyhands("gen_tpg", "--pieces=KPRkrp", "--num_pos=2000", "--tpg_dir=new", "--syzygy=tables")
    assert missing.returncode == 4
    assert "KRPvKRP.rtbw" in missing.stderr
    impossible = manyhands("gen_tpg", "--pieces=PRkrp", "--num_pos=2000", "--tpg_dir=new")
    assert impossible.returncode == 4
    assert "PRkrp" in impossible.stderr
    assert not (tmp_path / "new").exists()


def test_help_of_the_group(manyhands: Run) -> None:
    text = manyhands("shards").stdout
    for name in ("gen-endgames", "pack", "import", "info", "verify", "merge"):
        assert f"\n  {name} " in text
        assert manyhands("shards", name, "--help").returncode == 0
    assert manyhands("gen_tpg", "--help").stdout.startswith("Usage: manyhands gen_tpg [OPTIONS]")


def test_progress_in_words() -> None:
    beginning = Progress(rows=0, total=4096, kept=0, jobs=0, total_jobs=4, rows_per_s=0.0, left_s=None)
    assert rows_text(beginning) == "0 of 4,096 rows (0%), 0 of 4 shards"
    later = Progress(rows=3072, total=4096, kept=1024, jobs=3, total_jobs=4, rows_per_s=512.0, left_s=75.0)
    assert rows_text(later) == (
        "3,072 of 4,096 rows (75%), 3 of 4 shards, 1,024 rows kept of an earlier start, 512 rows/s, about 1:15 left"
    )
