"""What is said of a task of one's own that is not sound; the template of `manyhands init` is the sound one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from manyhands.engine.run import train
from manyhands.engine.task_check import check_in_process, check_task
from manyhands.errors import PlanError, WorkerError
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan

TEMPLATE = files("manyhands") / "tasks" / "template" / "my_task.py"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Plan, str]]:
    """The template's task with lines exchanged, in the working directory, and a plan for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def make(*exchanged: tuple[str, str], name: str = f"own_{tmp_path.name}") -> tuple[Plan, str]:
        text = TEMPLATE.read_text(encoding="utf-8")
        for old, new in exchanged:
            assert old in text
            text = text.replace(old, new)
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        target = f"{name}:FAMILY"
        plan = {
            "task": {"name": "custom", "target": target},
            "local": {"steps": 4, "batch_size": 8},
            "rounds": {"total": 1},
        }
        return resolve(plan), target

    return make


def test_a_sound_task_leaves_its_materials_to_the_training(own: Any, tmp_path: Path) -> None:
    plan, target = own()
    check_task(plan, tmp_path / "run" / "materials", target)
    events: list[dict[str, Any]] = []
    train(plan, tmp_path / "run", on_event=events.append, allowed_tasks=[target])
    kinds = [event["kind"] for event in events]
    assert kinds[-1] == "finished"
    assert "preparing" not in kinds


FAULTS = {
    "no method": (
        "    def tokens_per_sample(self)",
        "    def tokens(self)",
        r"without tokens_per_sample\(\)",
    ),
    "no Python": ("class MyTask:", "class MyTask", r"its import raised SyntaxError: .*own_.*\.py, line \d+"),
    "no set": (": tuple[str, ...] = (VALIDATION,)", " = ()", r"evaluation_sets is \(\)"),
    "a part of the materials": (
        'materials={"samples.safetensors": directory / "samples.safetensors"}',
        "materials={}",
        r"open\(plan, materials\) raised .*it may read nothing but the files that prepare names",
    ),
    "raises": (
        "        chosen = torch.from_numpy(indices)",
        "        chosen = torch.from_numpy(indices) / 0 @ None",
        r"batch\(numpy.arange\(8\)\) raised TypeError: .*own_.*\.py, line \d+",
    ),
    "too few in a batch": (
        "chosen = torch.from_numpy(indices)",
        "chosen = torch.from_numpy(indices)[:3]",
        r"'x' has the shape \(3, 2\) for 8 samples: the first dimension must be 8",
    ),
    "no loss": (
        'return Loss(mean=mean, count=len(batch["y"]))',
        "return mean",
        r"loss returned a Tensor: Loss\(mean=",
    ),
    "not finite": (
        'batch["y"])\n        return Loss',
        'batch["y"]) * torch.nan\n        return Loss',
        "mean is nan",
    ),
    "not differentiable": ("Loss(mean=mean", "Loss(mean=mean.detach()", "mean has no gradient"),
    "not one number": (
        'model(batch["x"]).float(), batch["y"])',
        'model(batch["x"]).float(), batch["y"], reduction="none")',
        r"mean has the shape \(8,\): one number was expected",
    ),
    "another model": (
        'cross_entropy(model(batch["x"]).float()',
        'cross_entropy(self.build_model()(batch["x"]).float()',
        "its gradient reaches no parameter of the model that it was given",
    ),
    "wrong names": (
        "Parameter(name=name,",
        'Parameter(name=f"net.{name}",',
        r"first_weights has 'first.bias' as \(32,\), and Prepared.parameters as nothing",
    ),
    "other count": (
        "samples=len(parts[TRAINING])",
        "samples=7",
        r"samples\(\) is 1800, and prepare counted 7",
    ),
    "buffers": (
        "self.last = torch",
        "self.norm = torch.nn.BatchNorm1d(width)\n        self.last = torch",
        r"build_model\(\) has buffers .*norm\.",
    ),
    "nothing saved": (
        'save_file(dict(weights), directory / "model.safetensors")',
        "pass",
        "save_pretrained wrote nothing",
    ),
    "metrics": ('{"accuracy": self.right / self.seen}', '{"accuracy": "good"}', "numbers were expected"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_is_said(own: Any, tmp_path: Path, fault: str) -> None:
    old, new, words = FAULTS[fault]
    plan, target = own((old, new))
    with pytest.raises(PlanError, match=words):
        check_task(plan, tmp_path / "materials", target)
    assert not list((tmp_path / "materials").glob("prepared-*"))


@pytest.mark.parametrize(
    ("old", "added", "words"),
    [
        (
            "        parts = ",
            "        np.load('gone.npy')",
            r"prepare\(plan, directory\) raised FileNotFoundError",
        ),
        ("class MyTask:", "np.load('gone.npy')", "its import raised FileNotFoundError"),
    ],
)
def test_the_place_of_an_error_is_the_line_of_the_tasks_own_file(
    own: Any, tmp_path: Path, old: str, added: str, words: str
) -> None:
    """And not the one in numpy where it was raised."""
    plan, target = own((old, f"{added}  # here\n{old}"))
    file = tmp_path / f"{target.partition(':')[0]}.py"
    lines = file.read_text(encoding="utf-8").splitlines()
    line = 1 + next(number for number, text in enumerate(lines) if text.endswith("# here"))
    with pytest.raises(PlanError, match=rf"{words}: .*gone\.npy' \({re.escape(str(file))}, line {line}\)"):
        check_task(plan, tmp_path / "materials", target)


def test_a_task_that_crashes_does_not_crash_us(
    own: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plan, target = own(
        (
            "        mean = torch.nn.functional",
            "        __import__('os').abort()\n        mean = torch.nn.functional",
        )
    )
    with pytest.raises(WorkerError, match="ended with signal 6"):
        check_in_process(plan, tmp_path / "materials", target)
    plan, target = own(("Loss(mean=mean", "Loss(mean=mean.detach()"))
    with pytest.raises(PlanError, match="nothing was started"):
        check_in_process(plan, tmp_path / "materials", target)
    assert f"error: task {target}: loss: mean has no gradient" in capfd.readouterr().err
