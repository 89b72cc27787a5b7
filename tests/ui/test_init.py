"""`manyhands init`, and the tutorial on it: its commands, as processes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.engine.run import train
from manyhands.plan.compose import load_plan
from manyhands.ui.main import run

Run = Callable[..., subprocess.CompletedProcess[str]]
TUTORIAL = Path(__file__).resolve().parents[2] / "docs" / "tutorials" / "own-task.md"


def test_what_is_there_stays(manyhands: Run, tmp_path: Path) -> None:
    made = manyhands("init", "mine")
    assert made.returncode == 0
    assert "cd mine" in made.stdout
    (tmp_path / "mine" / "my_task.py").write_text("# precious", encoding="utf-8")
    again = manyhands("init", "mine")
    assert again.returncode == 2
    assert "my_task.py exists already" in again.stderr
    assert (tmp_path / "mine" / "my_task.py").read_text() == "# precious"


def test_the_plan_evaluates_as_its_comments_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["init", str(tmp_path)]) == 0
    text = (tmp_path / "plan.yaml").read_text(encoding="utf-8")
    assert re.search(r"steps: 100 +# optimizer steps of a round\n", text)
    assert re.search(r"total: 5 +# 5 \* 100 steps\n", text)
    assert re.search(r"snapshot_every: 1 +# rounds between two evaluations, each with a checkpoint\n", text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "my_task.py").rename("task_of_init.py")  # a name that no other test has imported
    plan = load_plan("plan.yaml", ["local.batch_size=2", "task.target=task_of_init:FAMILY"])
    events: list[dict[str, Any]] = []
    train(plan, tmp_path / "run", on_event=events.append, allowed_tasks=["task_of_init:FAMILY"])
    for kind, first in (("evaluation", 0), ("saved", 100)):
        steps = [event["step"] for event in events if event["kind"] == kind]
        assert steps == list(range(first, 501, 100))


@pytest.mark.slow
def test_the_tutorial(manyhands: Run, tmp_path: Path) -> None:
    """Every line `    manyhands ...` runs; the one whose task was broken as the tutorial says is refused."""
    text = TUTORIAL.read_text(encoding="utf-8")
    commands = [
        shlex.split(line, comments=True) for line in re.findall(r"^    (manyhands .*|cd .*)$", text, re.M)
    ]
    assert len(commands) >= 5
    here = tmp_path
    for command in commands:
        if command[0] == "cd":
            here = here / command[1]
            continue
        done = manyhands(*command[1:], cwd=here, timeout=200, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, (command, done.stderr)
    task = here / "my_task.py"
    whole = task.read_text(encoding="utf-8")
    broken = whole.replace('count=len(batch["y"])', "count=None")
    assert broken != whole
    task.write_text(broken, encoding="utf-8")
    train = next(command for command in commands if command[1] == "train")
    refused = manyhands(*train[1:], "run=again", cwd=here, timeout=200, env={"OMP_NUM_THREADS": "1"})
    assert refused.returncode == 3
    assert "error: task my_task:FAMILY: loss: count is None" in refused.stderr
    assert "count is None" in text, "the tutorial shows this error"
