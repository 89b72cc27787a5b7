from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from manyhands.errors import PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import (
    ChessEndgamesTask,
    CustomTask,
    DummyTask,
    GridsTask,
    LanguageModelTask,
    SurvivalTask,
    TabularTask,
)
from manyhands.tasks.registry import FAMILIES, family_of


def test_every_task_of_the_schema_has_a_family() -> None:
    tasks = (
        LanguageModelTask(),
        GridsTask(),
        ChessEndgamesTask(),
        TabularTask(),
        SurvivalTask(),
        DummyTask(),
    )
    assert set(FAMILIES) == {task.name for task in tasks}
    for task in tasks:
        family = family_of(Plan(task=task))
        assert callable(family.prepare)
        assert callable(family.open)


def test_the_dummy_is_found_and_works_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from manyhands.plan.schema import Plan;"
        "from manyhands.plan.tasks import DummyTask;"
        "from manyhands.tasks.registry import family_of; from manyhands.tasks.dummy import DummyWork;"
        "plan = Plan(task=DummyTask(parameters=100)); made = family_of(plan).prepare(plan, Path(sys.argv[1]));"
        "DummyWork(plan, made.parameters);"
        "print([m for m in ('torch', 'transformers', 'safetensors.torch') if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == "[]\n"


def test_custom_code_runs_only_if_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from manyhands.tasks.dummy import FAMILY\nimport builtins\nbuiltins.mine_was_imported = True\nNOT_ONE = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    plan = Plan(task=CustomTask(target="mine:FAMILY"))
    for allowed in ((), ("mine", "mine:OTHER", "mine:FAMILY2")):
        with pytest.raises(PlanError, match="'mine:FAMILY': the plan names code to run"):
            family_of(plan, allowed=allowed)
    assert "mine" not in sys.modules
    family = family_of(plan, allowed=("mine:FAMILY",))
    assert family is sys.modules["mine"].FAMILY

    for target, message in (
        ("mine:NOT_ONE", "is a int: an object with prepare"),
        ("mine:MISSING", "has no attribute"),
        ("no_such_module:X", "No module named"),
    ):
        with pytest.raises(PlanError, match=message):
            family_of(Plan(task=CustomTask(target=target)), allowed=(target,))
