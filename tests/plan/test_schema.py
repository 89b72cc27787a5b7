"""The plan's type: frozen, strict about keys, and its parts with sound defaults."""

from typing import Any

import pytest
from pydantic import ValidationError

from manyhands.errors import PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import LanguageModelTask


def test_a_plan_does_not_change_and_compares_by_value() -> None:
    assert Plan() == Plan()
    assert Plan(seed=1) != Plan(seed=2)
    with pytest.raises(ValidationError):
        Plan().seed = 2  # type: ignore[misc]


def test_two_default_plans_share_nothing_that_changes() -> None:
    first = LanguageModelTask()
    first.model["n_layer"] = 99
    assert LanguageModelTask().model["n_layer"] == 4
    assert LanguageModelTask(model={"n_embd": 8}).model["n_layer"] == 4


@pytest.mark.parametrize(
    "data",
    [
        {"name": ""}, {"name": "Two Words"}, {"name": "a" * 65}, {"run_id": "ä"}, {"run_id": "a\n"}, {"seed": 2**63},
        {"seed": 1.5}, {"outer": {"lr": 0}}, {"outer": {"momentum": 1}}, {"outer": {"lr": float("inf")}},
        {"rounds": {"lag": 3}}, {"codec": {"block": 8}}, {"task": {"name": "custom", "target": "no colon"}},
        {"task": {"name": "custom", "target": "os:system; x"}}, {"task": {"name": "custom", "target": "a:b\n"}},
        {"membership": {"allow": ["AB" * 32]}}, {"task": {"name": "dummy", "block_size": 64}},
    ],
    ids=str,
)  # fmt: skip
def test_values_outside_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        Plan.parse(data)


def test_empty_text_is_no_preset_and_no_run_id() -> None:
    assert Plan.parse({"run_id": "", "preset": ""}) == Plan()


def test_plain_data_comes_back_as_the_same_plan() -> None:
    plan = Plan.parse({"task": {"name": "dummy"}, "membership": {"allow": ["ab" * 32]}})
    assert Plan.parse(plan.model_dump()) == plan
    assert Plan.parse(plan.model_dump(mode="json")) == plan
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
