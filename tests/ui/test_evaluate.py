from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from manyhands.node.server.preparation import keep_plan
from manyhands.plan.compose import load_plan
from manyhands.ui.main import run

TASK = """
task: hands
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def test_the_tasks_own_sets(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "tiny", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    events = [json.loads(line) for line in (trained / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["kind"] == "evaluation"][-1]
    assert row["set"] == "validation"
    assert row["unit"] == "tokens"
    assert row["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert row["samples"] == last["samples"]
    assert run(["eval", "tiny", "--limit", "3"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:3] == ["set", "loss", "samples"]
    assert table[2].split()[2] == "3"


def test_an_adapter_on_its_frozen_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those are in the materials alone: the checkpoint has what was trained."""
    pytest.importorskip("peft", reason="the extra lora is not installed")
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    plan = yaml.safe_load((trained / "plan.yaml").read_text())
    task = {"weights": str(trained / "checkpoints" / "step-00000008"), "adapter": {"name": "lora"}}
    task |= {"name": "language_model", "text": plan["task"]["text"], "block_size": 16}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"task": task}), encoding="utf-8")
    train = ["train", "--plan", str(tmp_path / "plan.yaml"), "run=adapted", "--logs", "none"]
    assert run(train) == 0
    events = (tmp_path / "runs" / "adapted" / "events.jsonl").read_text().splitlines()
    assert run(["eval", "adapted", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["loss"] == pytest.approx(json.loads(events[-1])["validation_loss_after"], rel=1e-6)


def test_a_broken_checkpoint(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / "broken")
    checkpoint = tmp_path / "broken" / "checkpoints" / "step-00000008"
    for file in (checkpoint / "state" / "state.safetensors", checkpoint / "model.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    assert run(["eval", str(tmp_path / "broken")]) == 9
    assert "step-00000008/state" in capsys.readouterr().err
    assert run(["sample", str(tmp_path / "broken")]) == 4
    assert "no language model that can be read" in capsys.readouterr().err


def test_a_run_that_was_served_here(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", "tiny", "--format", "json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    kept = tmp_path / "runs" / "served" / "checkpoints" / "round-00000002"
    shutil.copytree(trained / "checkpoints" / "step-00000008", kept)
    shutil.rmtree(kept / "state")  # a run's checkpoints have the task's own form alone
    shutil.copytree(trained / "materials", tmp_path / "runs" / "served" / "server" / "evaluator")
    keep_plan(tmp_path / "runs" / "served", load_plan(trained / "plan.yaml"))
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    assert run(["eval", "served", "--format", "json"]) == 0
    served = json.loads(capsys.readouterr().out)
    assert served[0]["samples"] == alone[0]["samples"]
    assert served[0]["loss"] == pytest.approx(alone[0]["loss"], rel=1e-6)


def test_a_checkpoint_without_its_training(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["eval", str(trained / "checkpoints"), "--seed", "1"]) == 2
    assert "give --tasks too" in capsys.readouterr().err
    assert run(["eval", str(tmp_path / "nothing")]) == 9
    assert "whatever its --data-dir" in capsys.readouterr().err
    other = tmp_path / "alone"
    other.mkdir()
    (other / "config.json").write_text("{}", encoding="utf-8")
    assert run(["eval", str(other)]) == 2
    assert "lies in no directory of a training" in capsys.readouterr().err


@pytest.fixture
def task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": f"many {i}", "choices": [" hands", " work"], "answer": i % 2} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "hands.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    return tmp_path / "tasks"


@pytest.mark.usefixtures("trained")
@pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
def test_a_task_of_lm_eval_from_a_file(task_files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "tiny", "--tasks", "hands", "--include-path", str(task_files), "--format", "json"]
    found = []
    for more in (["--seed", "3"], ["--seed", "3"], ["--seed", "3", "--limit", "4", "--num-fewshot", "1"]):
        assert run([*command, *more]) == 0
        told = capfd.readouterr()
        assert told.err == ""
        (row,) = json.loads(told.out)
        found.append(row)
    assert found[0] == found[1]
    assert found[0]["task"] == "hands"
    assert found[0]["metric"] == "acc"
    assert 0 <= found[0]["value"] <= 1
    assert (found[0]["samples"], found[0]["fewshot"]) == (6, 0)
    assert (found[2]["samples"], found[2]["fewshot"]) == (4, 1)


@pytest.mark.usefixtures("trained")
@pytest.mark.filterwarnings("ignore")
def test_broken_data_of_a_task_is_named(task_files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (task_files.parent / "rows.jsonl").unlink()
    assert run(["eval", "tiny", "--tasks", "hands", "--include-path", str(task_files)]) == 4
    assert "lm-eval on hands: " in capfd.readouterr().err


def test_without_the_extra(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [n for n in sys.modules if n == "lm_eval" or n.startswith("lm_eval.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["eval", str(trained), "--tasks", "hellaswag"]) == 13
    assert "pip install 'manyhands[eval]'" in capsys.readouterr().err
