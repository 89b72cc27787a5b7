"""Every task from existing weights, whole or through LoRA, by the commands that a person gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyhands.plan.compose import load_plan
from manyhands.plan.resolve import resolve
from manyhands.simulation import simulate
from manyhands.ui.main import run

SMALL = ("rounds.total=1", "local.steps=4", "local.batch_size=8", "evaluation.max_batches=2")
TASKS: Mapping[str, tuple[str, ...]] = {
    "grids": (
        "task.generated.puzzles=10",
        "task.generated.evaluation_puzzles=4",
        "task.model.width=16",
        "task.model.heads=2",
    ),
    "tabular": ("task.table.generated_rows=100",),
    "survival": ("task.table.generated_rows=100", "task.hidden_sizes=[4]"),
    "chess_endgames": ("task.validation_positions=50", "task.model.width=16", "task.model.heads=2"),
}
LORA = ("task.adapter.name=lora", "task.adapter.rank=2")

Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> Train:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))

    def go(name: str, *overrides: str) -> list[dict[str, Any]]:
        command = ["train", f"task={task}", *TASKS[task], *SMALL, f"run={name}", "--logs", "none", *overrides]
        assert run(command) == 0
        lines = (tmp_path / "runs" / name / "events.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["kind"] == "evaluation"]

    return go


@pytest.fixture
def weights(train: Train, tmp_path: Path) -> tuple[float, Path]:
    """Loss and checkpoint of a training that others begin with."""
    return train("base")[-1]["loss"], tmp_path / "runs" / "base" / "checkpoints" / "step-00000004"


def test_whole(train: Train, weights: tuple[float, Path]) -> None:
    loss, checkpoint = weights
    first, last = train("tuned", f"task.weights={checkpoint}")
    assert first["step"] == 0
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert last["loss"] != first["loss"]


def test_lora(
    train: Train, weights: tuple[float, Path], task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    loss, checkpoint = weights
    frozen = load_file(checkpoint / "model.safetensors")
    first, last = train("adapted", f"task.weights={checkpoint}", *LORA)
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert last["loss"] != first["loss"]
    kept = tmp_path / "runs" / "adapted" / "checkpoints" / "step-00000004"
    assert not (kept / "model.safetensors").exists()
    assert all(".lora_" in name for name in load_file(kept / "adapter_model.safetensors"))
    state = load_file(kept / "state" / "state.safetensors")
    assert [name for name in state if "lora_" not in name] == []

    capsys.readouterr()
    assert run(["eval", "adapted", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert run(["sample", "adapted"]) == 4
    assert (
        f"is of the task {task}: give a checkpoint that a language model run wrote" in capsys.readouterr().err
    )
    file = tmp_path / "merged.safetensors"
    assert run(["export", "adapted", "--to", "safetensors", "--output", str(file)]) == 0
    merged = load_file(file)
    assert {name: t.shape for name, t in merged.items()} == {name: t.shape for name, t in frozen.items()}
    assert any((merged[name] != frozen[name]).any() for name in frozen)

    again = train("again", f"task.weights={kept}", *LORA)  # from a checkpoint that is an adapter itself
    assert again[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)


@pytest.mark.parametrize("task", ["grids"], indirect=True)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_lora_by_two_processes_gone_on_by_one_and_exported(
    train: Train, weights: tuple[float, Path], strategy: str, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    given = (
        f"task.weights={weights[1]}",
        *LORA,
        "rounds.total=2",
        "rounds.snapshot_every=1",
        f"parallel.strategy={strategy}",
    )
    both = train("both", *given, "processes=2")
    kept = tmp_path / "runs" / "both" / "checkpoints"
    (one,) = train("one", *given, "--resume", str(kept / "step-00000004"))[-1:]
    assert both[-1]["step"] == one["step"] == 8
    assert one["loss"] == pytest.approx(both[-1]["loss"], rel=1e-5)
    adapter = load_file(kept / "step-00000008" / "adapter_model.safetensors")
    resumed = load_file(
        tmp_path / "runs" / "one" / "checkpoints" / "step-00000008" / "adapter_model.safetensors"
    )
    for name, tensor in adapter.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-5)

    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    file = tmp_path / "merged.onnx"
    assert (
        run(["export", "both", "--to", "onnx", "--output", str(file)]) == 0
    )  # compared with torch before it is


def test_weights_of_an_adapter_that_are_gone_are_named(
    train: Train, weights: tuple[float, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    train("adapted", f"task.weights={weights[1]}", *LORA)
    weights[1].rename(tmp_path / "moved")
    assert run(["export", "adapted", "--to", "safetensors", "--output", str(tmp_path / "merged")]) == 4
    told = capsys.readouterr().err
    assert f"is an adapter of the weights in {weights[1]}, which are not on this machine" in told
    file = tmp_path / "runs" / "adapted" / "checkpoints" / "step-00000004" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(weights[1]), str(tmp_path / "moved")))
    assert run(["export", "adapted", "--to", "safetensors", "--output", str(tmp_path / "merged")]) == 0


def test_in_a_run_only_the_adapter_is_sent(train: Train, weights: tuple[float, Path], tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    train("adapted", f"task.weights={weights[1]}", *LORA)
    trained = load_plan(tmp_path / "runs" / "adapted" / "plan.yaml")
    run_of_two = {"preset": "diloco", "local": {"steps": 3, "batch_size": 8}, "rounds": {"total": 2}}
    simulated = simulate(
        resolve(
            run_of_two | {"task": trained.task.model_dump(mode="json"), "evaluation": {"max_batches": 2}}
        ),
        2,
    )
    assert simulated.state.phase == "finished"
    adapter = [t for name, t in simulated.weights.items() if ".lora_" in name]
    sent = 4 * sum(t.numel() for t in adapter)
    header = 8192 + 256 * len(adapter)  # of two files, with a line for each tensor
    assert all(2 * sent < result.update_bytes < 2 * (sent + header) for result in simulated.rounds)
    for name, tensor in load_file(weights[1] / "model.safetensors").items():
        (same,) = {
            n for n in simulated.weights if n.replace(".base_layer", "").endswith("base_model.model." + name)
        }
        assert torch.equal(simulated.weights[same], tensor), name


def test_a_model_of_other_sizes(
    weights: tuple[float, Path], task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "task.hidden_sizes=[5]" if task in ("tabular", "survival") else "task.model.width=32"
    command = [
        "train",
        f"task={task}",
        *TASKS[task],
        *SMALL,
        f"task.weights={weights[1]}",
        setting,
        "run=wide",
    ]
    assert run([*command, "--logs", "none"]) != 0
    said = capsys.readouterr().err
    assert setting.partition("=")[0] in said
    assert "give the plan the sizes of the weights" in said


def test_weights_that_are_none(
    train: Train, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train("base")
    for where, said, code in (
        (tmp_path / "gone", "there is no directory", 4),
        (
            tmp_path / "runs",
            "holds no model" if task in ("grids", "chess_endgames") else "statistics.json",
            4,
        ),
        (tmp_path, "holds no model" if task in ("grids", "chess_endgames") else "statistics.json", 4),
    ):
        assert (
            run(["train", f"task={task}", *TASKS[task], f"task.weights={where}", "run=x", "--logs", "none"])
            == code
        )
        assert said in capsys.readouterr().err


def test_what_a_tables_answers_mean_is_as_for_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))

    def table(name: str, *classes: str) -> str:
        rows = "".join(f"{i % 7},{i % 5 * 100},{classes[i % len(classes)]}\n" for i in range(120))
        (tmp_path / name).write_text(f"a,b,target\n{rows}", encoding="utf-8")
        return f"task.table.files=[{tmp_path / name}]"

    def train(*overrides: str) -> int:
        return run(["train", "task=tabular", *SMALL, "--logs", "none", *overrides])

    assert train(table("first.csv", "x", "y", "z"), "run=first") == 0
    weights = f"task.weights={tmp_path}/runs/first/checkpoints/step-00000004"
    assert train(table("fewer.csv", "z", "y"), weights, "run=fewer") == 0  # z is still the third class
    kept = tmp_path / "runs" / "fewer" / "checkpoints" / "step-00000004"
    for name in ("statistics.json", "table.json"):
        there, here = (
            json.loads((place / name).read_text()) for place in (Path(weights.partition("=")[2]), kept)
        )
        assert here == there
    assert json.loads((kept / "table.json").read_text())["classes"] == ["x", "y", "z"]
    capsys.readouterr()
    assert train(table("other.csv", "x", "w"), weights, "run=other") == 4
    assert "the target has the class 'w'" in capsys.readouterr().err
    numbers = (table("numbers.csv", "1", "2", "3"), "task.problem=regression")
    assert train(*numbers, weights, "run=numbers") == 4
    assert "the problem 'classification', the plan's is 'regression'" in capsys.readouterr().err


def test_weights_are_found_below_runs_and_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter names its base for good, wherever the training that goes on is called from."""
    pytest.importorskip("peft", reason="the extra lora is not installed")
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    small = ["train", "task=tabular", "task.table.generated_rows=60", *SMALL, "--logs", "none"]
    assert run([*small, "run=base"]) == 0
    monkeypatch.chdir(tmp_path / "runs" / "base" / "checkpoints")
    assert run([*small, *LORA, "task.weights=step-00000004", "run=here"]) == 0
    assert run([*small, *LORA, "task.weights=base/checkpoints/step-00000004", "run=named"]) == 0
    assert run([*small, *LORA, "task.weights=base", "run=newest"]) == 0
    bases = []
    for name in ("here", "named", "newest"):
        kept = tmp_path / "runs" / name / "checkpoints" / "step-00000004" / "adapter_config.json"
        bases.append(json.loads(kept.read_text())["base_model_name_or_path"])
    assert bases == [str(tmp_path / "runs" / "base" / "checkpoints" / "step-00000004")] * 3


def test_rows_made_ahead_mean_what_the_weights_mean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    for name, classes in (("first", "xy"), ("other", "vw")):
        rows = "".join(f"{i % 7},{classes[i % 2]}\n" for i in range(100))
        (tmp_path / f"{name}.csv").write_text(f"a,target\n{rows}", encoding="utf-8")
    small = ["task=tabular", *SMALL]
    assert (
        run(["train", *small, f"task.table.files=[{tmp_path}/first.csv]", "run=first", "--logs", "none"]) == 0
    )
    checkpoint = tmp_path / "runs" / "first" / "checkpoints" / "step-00000004"
    agreed = f"task.features.statistics={checkpoint}/statistics.json"
    table = f"task.table.files=[{tmp_path}/other.csv]"
    assert (
        run(["shards", "pack", *small[:1], table, agreed, "--out", str(tmp_path / "s"), "--processes", "1"])
        == 0
    )
    capsys.readouterr()
    words = [
        "train",
        "--shards",
        str(tmp_path / "s"),
        f"task.weights={checkpoint}",
        "run=over",
        "--logs",
        "none",
    ]
    assert run(words) == 4
    assert "their classes is ['x', 'y'], and that of these shards ['v', 'w']" in capsys.readouterr().err
