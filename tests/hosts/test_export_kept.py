"""What exports the checkpoints of a training on the host, beside it and after it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from manyhands.engine.configuration import configure
from manyhands.engine.run import train
from manyhands.hosts.export_kept import export_kept

TINY = ("task=tabular", "task.table.generated_rows=200", "local.steps=5", "local.batch_size=8", "rounds.total=2",
        "rounds.snapshot_every=1", "evaluation.max_batches=2", "exec.threads=1")  # fmt: skip
FIRST, LAST = "step-00000005", "step-00000010"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    configuration = configure(TINY)
    configuration.keep(directory)
    train(configuration.plan, directory, settings=configuration.settings)
    return directory


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def exported(directory: Path) -> set[str]:
    return {path.name for path in (directory / "exports").iterdir()}


def test_the_last_checkpoint_waits_for_the_end(directory: Path) -> None:
    events = directory / "events.jsonl"
    whole = events.read_bytes()
    events.write_bytes(whole[: whole.rfind(b'"finished"')])  # it is being written
    (line,) = export_kept(directory)
    assert line.startswith(f"exported {FIRST}.onnx, ")
    assert exported(directory) == {f"{FIRST}.onnx", f"{FIRST}.onnx.json"}
    assert json.loads((directory / "exports" / f"{FIRST}.onnx.json").read_text())["step"] == 5

    events.write_bytes(whole)
    (line,) = export_kept(directory)
    assert line.startswith(f"exported {LAST}.onnx, ")
    assert json.loads((directory / "exports" / f"{LAST}.onnx.json").read_text())["status"] == "finished"
    assert export_kept(directory) == []


def test_a_checkpoint_that_is_not_kept_has_no_export_either(directory: Path) -> None:
    assert len(export_kept(directory)) == 2
    shutil.rmtree(directory / "checkpoints" / FIRST)
    assert export_kept(directory) == []
    assert exported(directory) == {f"{LAST}.onnx", f"{LAST}.onnx.json"}


def test_what_is_said_after_the_end_changes_nothing(directory: Path) -> None:
    with (directory / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time_ms": 0, "kind": "warning", "text": "the logger was slow"}) + "\n")
    assert len(export_kept(directory)) == 2


def test_an_export_that_was_killed_is_made_again(directory: Path) -> None:
    exports = directory / "exports"
    exports.mkdir()
    (exports / f"{FIRST}.onnx").write_bytes(b"half")
    (exports / f".{FIRST}.onnx.partial-7.data").write_bytes(b"half")
    assert len(export_kept(directory)) == 2
    assert exported(directory) == {f"{name}.onnx{end}" for name in (FIRST, LAST) for end in ("", ".json")}
    assert (exports / f"{FIRST}.onnx").stat().st_size > 4


def test_one_that_was_made_once_more_is_exported_once_more(directory: Path) -> None:
    export_kept(directory)
    made_ns = (directory / "exports" / f"{FIRST}.onnx.json").stat().st_mtime_ns
    os.utime(directory / "checkpoints" / FIRST, ns=(made_ns + 1_000_000_000, made_ns + 1_000_000_000))
    (line,) = export_kept(directory)
    assert line.startswith(f"exported {FIRST}.onnx")


def test_what_cannot_be_exported_is_said(directory: Path) -> None:
    (directory / "checkpoints" / FIRST / "model.safetensors").write_bytes(b"no tensors")
    told, made = export_kept(directory)
    assert told.startswith(f"no ONNX export of {FIRST}: ")
    assert made.startswith(f"exported {LAST}.onnx")
