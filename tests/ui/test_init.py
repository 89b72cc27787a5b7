"""`manyhands init`, and the tutorial on it: its commands, as processes."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

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
