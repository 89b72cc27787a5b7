"""Settings of the table tasks: nothing is accepted and then ignored."""

from __future__ import annotations

from typing import Any

import pytest

from manyhands.errors import PlanError
from manyhands.plan.compose import compose
from manyhands.plan.schema import Plan
from manyhands.plan.tables import SurvivalTask, TabularTask


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"table": {"separator": ";"}}, "are for files"),
        ({"table": {"files": ["a"], "generated_rows": 99}}, "leave one out"),
        ({"split": {"key": "id"}}, "give both or none"),
        ({"split": {"file": "a", "key": "id"}}, "needs 'column'"),
        ({"split": {"training": ["a"]}}, "needs 'column'"),
        ({"split": {"column": "a", "share": 0.1}}, "two ways to split"),
        ({"split": {"column": "a", "training": ["test"]}}, "share a name"),
        ({"features": {"columns": ["a"], "without": ["b"]}}, "give one of the two"),
        ({"features": {"drop_first": True}}, "needs 'categorical'"),
        ({"features": {"statistics": "a", "standardize": "all"}}, "leave those settings out"),
        ({"hidden_sizes": [0]}, "expected 1 or more"),
        ({"targt": "a"}, r"Did you mean '\S*target'"),
    ],
)
def test_settings_without_effect_are_refused(task: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.parse({"task": {"name": "tabular", **task}})


def test_overrides_as_people_write_them() -> None:
    plan = compose(
        [
            "task=tabular",
            "task.target='num > 0'",
            "task.table.files=[a.csv,b.csv]",
            "task.features.categorical=[cp]",
            "task.hidden_sizes=[]",
        ]
    )
    assert isinstance(plan.task, TabularTask)
    assert plan.task.target == "num > 0"
    assert plan.task.table.files == ("a.csv", "b.csv")
    assert plan.task.hidden_sizes == ()
    assert compose(["task=survival"]).task == SurvivalTask()
