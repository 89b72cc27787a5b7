"""What a client refuses to run, whatever way the plan came."""

from typing import Any

import pytest

from manyhands.errors import PlanError
from manyhands.plan.resolve import resolve
from manyhands.plan.safety import MAX_DEPTH, MAX_VALUES, check_runnable, refuse_code
from manyhands.plan.schema import Data, Plan
from manyhands.plan.tasks import CustomTask, LanguageModelTask

CUSTOM = Plan(task=CustomTask(target="lab.tasks:Mine"))


def test_built_in_tasks_run() -> None:
    check_runnable(Plan())
    check_runnable(Plan(), ["lab.tasks:Mine"])


def test_a_custom_task_runs_when_its_full_name_is_allowed() -> None:
    check_runnable(CUSTOM, ["other:Task", "lab.tasks:Mine"])
    for allowed in ([], ["lab.tasks"], ["lab.tasks:Min"], ["lab.tasks:Mine2"], ["lab.tasks", "Mine"]):
        with pytest.raises(
            PlanError, match=r"'task\.target' is 'lab\.tasks:Mine': the plan names code to run"
        ):
            check_runnable(CUSTOM, allowed)


def test_shards_are_for_ones_own_devices() -> None:
    with pytest.raises(
        PlanError, match=r"'data\.shards' is 'dir': runs of several machines do not read shards"
    ):
        check_runnable(Plan(data=Data(shards="dir")))


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "os.system"},
        {"auto_map": {"AutoModelForCausalLM": "x.Y"}},
        {"a": [{"trust_remote_code": True}]},
        {"use_kernels": True},
        {"attn_implementation": "someone/kernels"},
        {"name": "${oc.env:SECRET}"},
        {"x": "!!python/object:os.system"},
    ],
)
def test_a_plan_that_was_not_resolved_here_is_checked_too(model: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="plain data"):
        check_runnable(Plan(task=LanguageModelTask(model=model)))


def test_plain_values_pass() -> None:
    refuse_code(
        {"model": {"attn_implementation": "sdpa", "use_kernels": False, "_x": 1, "path": "a/b"}}, "plan"
    )


def test_size_and_depth_are_bounded() -> None:
    refuse_code({"x": [0] * (MAX_VALUES - 2)}, "plan")
    with pytest.raises(PlanError, match="that is no plan"):
        refuse_code({"x": [0] * MAX_VALUES}, "plan")
    deep: Any = 1
    for _ in range(MAX_DEPTH):
        deep = {"x": deep}
    refuse_code(deep, "plan")
    with pytest.raises(PlanError, match="that is no plan"):
        refuse_code([deep], "plan")


def test_data_from_python_is_checked_as_files_are() -> None:
    with pytest.raises(
        PlanError, match=r"here: 'task\.settings\._target_' is 'os\.system': this names code to run"
    ):
        resolve(
            {"task": {"name": "custom", "target": "a:b", "settings": {"_target_": "os.system"}}}, where="here"
        )
