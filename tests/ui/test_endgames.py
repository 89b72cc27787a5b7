"""Chess endgames by the installed command: trained, judged, exported. Three men, so nothing is needed beside it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., subprocess.CompletedProcess[str]]
WORDS = (
    "task=chess_endgames", "task.positions=2000", "task.validation_positions=200", "task.model.tokens=pieces",
    "task.model.width=16", "task.model.layers=1", "local.steps=20", "local.batch_size=50", "rounds.total=1",
    "optimizer=muon", "optimizer.lr=0.02", "exec.threads=1", "run=kpk",
)  # fmt: skip


def test_trained_judged_and_exported(manyhands: Run, tmp_path: Path) -> None:
    trained = manyhands("train", *WORDS, timeout=200)
    assert trained.returncode == 0, trained.stderr
    judged = manyhands("eval", "kpk", "--limit", "200", "--pictures", "worst", timeout=200)
    assert judged.returncode == 0, judged.stderr
    lines = judged.stdout.splitlines()
    assert {"value accuracy", "policy accuracy", "samples/s"} <= {
        cell.strip() for cell in lines[0].split("  ")
    }
    for title in ("validation: value", "validation: policy", "validation: worst of the value"):
        assert title in lines
    assert " w - - 0 1" in judged.stdout, "the worst errors are named by their FEN"
    assert (tmp_path / "worst" / "validation.png").read_bytes()[:4] == b"\x89PNG"

    as_json = manyhands("eval", "kpk", "--limit", "200", "--format", "json", timeout=200)
    (row,) = json.loads(as_json.stdout)
    right = sum(each[each["truth"]] for each in row["listings"]["value"])
    assert row["metrics"]["value_accuracy"] == right / 200
    assert row["picture"] is None

    exported = manyhands("export", "kpk", "--to", "safetensors", "--fp16")
    assert exported.returncode == 0, exported.stderr
    results = json.loads((tmp_path / "step-00000020.fp16.safetensors.json").read_text())
    assert results["status"] == "finished"
    assert results["config"]["plan"]["task"]["pieces"] == "KPk"
    assert results["samples"] == 1000
    assert results["metrics"]["validation"].keys() == row["metrics"].keys()


def test_missing_tables_are_named_before_anything_is_trained(manyhands: Run, tmp_path: Path) -> None:
    done = manyhands("train", "task=chess_endgames", "task.pieces=KPRkrp", f"task.syzygy='{tmp_path}'")
    assert done.returncode != 0
    assert "KRPvKRP.rtbw" in done.stderr
    assert "mirror" in done.stderr


def test_pictures_are_of_the_tasks_own_sets(manyhands: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = manyhands("eval", str(tmp_path), "--tasks", "hellaswag", "--pictures", "worst")
    assert done.returncode == 2
    assert "leave out --tasks" in done.stderr
