"""The results beside an export are those of the checkpoint, whatever came after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from manyhands.engine.configuration import configure
from manyhands.engine.export import Exported
from manyhands.engine.results import write_results
from manyhands.errors import StorageError

PLAN = ("task=tabular", "local.batch_size=8", "local.steps=10", "rounds.total=3")


def event(kind: str, second: float, **fields: Any) -> dict[str, Any]:
    return {"version": 1, "time_ms": round(1000 * second), "kind": kind, **fields}


def evaluation(step: int, second: float, loss: float) -> dict[str, Any]:
    return event("evaluation", second, step=step, set="validation", loss=loss, metrics={"accuracy": 1 - loss})


EVENTS = [
    event("preparing", 100, task="tabular"),
    evaluation(0, 101, 0.9),
    event("started", 102, step=0, parameters=123, hosts=["one"]),
    event("step", 104, step=10, loss=0.7),
    evaluation(10, 105, 0.6),
    event("step", 106, step=20, loss=0.1),  # given up: killed, and gone on from step 10
    event("resumed", 206, step=10, checkpoint="step-00000010"),
    event("started", 207, step=10, parameters=123, hosts=["one", "two"]),
    event("step", 209, step=20, loss=0.5),
    evaluation(20, 210, 0.4),
    event("interrupted", 211, step=20, checkpoint="step-00000020"),
    event("resumed", 311, step=20, checkpoint="step-00000020"),
    event("started", 312, step=20, parameters=123, hosts=["one"]),
    event("step", 314, step=30, loss=0.3),
    evaluation(30, 315, 0.2),
    event("finished", 316, step=30),
]


def results(tmp_path: Path, checkpoint: str) -> dict[str, Any]:
    training = tmp_path / "training"
    configure(PLAN).keep(training)
    lines = [json.dumps(each) for each in EVENTS]
    (training / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    exported = Exported(file=tmp_path / "m.onnx", size_bytes=5, difference=1e-6, largest=2.0)
    file = write_results(exported, training / "checkpoints" / checkpoint, training, half=True)
    assert file == tmp_path / "m.onnx.json"
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_last_checkpoint(tmp_path: Path) -> None:
    found = results(tmp_path, "step-00000030")
    assert (found["status"], found["step"], found["steps"], found["samples"]) == ("finished", 30, 30, 240)
    assert found["losses"] == {"training": 0.3, "validation": 0.2}
    assert found["metrics"] == {"validation": {"accuracy": 0.8}}
    assert found["ended"] == "1970-01-01T00:05:16+00:00"
    assert found["parameters"] == 123
    assert found["config"]["plan"]["local"]["batch_size"] == 8
    assert found["config"]["engine"]["exec"]["precision"] == "fp32"
    assert found["exported"] == {
        "file": "m.onnx", "checkpoint": "step-00000030", "precision": "fp16", "size_bytes": 5,
        "difference_from_torch": 1e-6,
    }  # fmt: skip


def test_an_earlier_checkpoint(tmp_path: Path) -> None:
    """Of the course that was taken, with its hosts; the time when nothing ran does not count."""
    found = results(tmp_path, "step-00000020")
    assert (found["status"], found["step"]) == ("interrupted", 20)
    assert found["losses"] == {"training": 0.5, "validation": 0.4}
    assert found["hosts"] == ["one", "two"]
    assert found["duration_s"] == pytest.approx(5 + 5)
    assert results(tmp_path, "step-00000010")["status"] == "unfinished"


def test_of_a_checkpoint_elsewhere_only_the_export_is_known(tmp_path: Path) -> None:
    exported = Exported(file=tmp_path / "m.safetensors", size_bytes=5)
    file = write_results(exported, tmp_path / "step-00000030", None, half=False)
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found.keys() == {"version", "exported"}
    assert found["exported"]["difference_from_torch"] is None


def test_broken_events_are_named(tmp_path: Path) -> None:
    results(tmp_path, "step-00000030")
    (tmp_path / "training" / "events.jsonl").write_text("{\n", encoding="utf-8")
    exported = Exported(file=tmp_path / "m.onnx", size_bytes=5)
    with pytest.raises(StorageError, match=r"events\.jsonl"):
        write_results(exported, tmp_path / "step-00000030", tmp_path / "training", half=False)
