"""Faults in words: the path that one would write, the value, what was expected, the nearest that exists."""

from typing import Any

import pytest
from pydantic import BaseModel

from manyhands.config import did_you_mean, differences, shown
from manyhands.errors import PlanError
from manyhands.plan.language_model import LanguageModelTask, TextSource
from manyhands.plan.schema import LocalWork, Plan


def keys_of(section: type[BaseModel]) -> str:
    return f" Known: {', '.join(sorted(section.model_fields))}."


TASKS = "'language_model', 'grids', 'chess_endgames', 'tabular', 'survival', 'dummy' or 'custom'"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"local": {"stpes": 5}},
            "plan: unknown key 'local.stpes'. Did you mean 'local.steps'?" + keys_of(LocalWork),
        ),
        (
            {"task": {"name": "language_model", "blok_size": 8}},
            "plan: unknown key 'task.blok_size'. Did you mean 'task.block_size'?"
            + keys_of(LanguageModelTask),
        ),
        (
            {"task": {"name": "language_model", "text": {"pth": "x"}}},
            "plan: unknown key 'task.text.pth'. Did you mean 'task.text.path'?" + keys_of(TextSource),
        ),
        ({"codec": {"fp32": 1}}, "plan: unknown key 'codec.fp32'. Known: block, error_feedback, name."),
        ({"topology": "ring"}, "plan: 'topology' is 'ring': expected 'star' or 'mesh'."),
        (
            {"local": {"kind": "stps"}},
            "plan: 'local.kind' is 'stps': expected 'gradient' or 'steps'. Did you mean 'steps'?",
        ),
        ({"merge": {"rule": "median"}}, "plan: 'merge.rule' is 'median': expected 'mean'."),
        (
            {"task": {"name": "languge_model"}},
            f"plan: 'task.name' is 'languge_model': expected {TASKS}. Did you mean 'language_model'?",
        ),
        ({"task": {"name": 7}}, f"plan: 'task.name' is '7': expected {TASKS}."),
        ({"task": {"samples": 7}}, "plan: 'task.name' is missing."),
        (
            {"task": {"name": "custom"}},
            "plan: 'task.target' is missing: name your own task as task.target=module:object; `manyhands "
            "init` writes one.",
        ),
        ({"local": {"steps": 0}}, "plan: 'local.steps' is 0: expected 1 or more."),
        (
            {"task": {"name": "dummy", "tensors": "many"}},
            "plan: 'task.tensors' is 'many': expected a whole number.",
        ),
        ({"local": {"steps": 2.5}}, "plan: 'local.steps' is 2.5: expected a whole number."),
        (
            {"local": {"optimizer": {"lr": "big"}}},
            "plan: 'local.optimizer.lr' is 'big': expected a number.",
        ),
        ({"local": {"optimizer": {"lr": 0}}}, "plan: 'local.optimizer.lr' is 0: expected more than 0."),
        (
            {"local": {"optimizer": {"beta1": 1.0}}},
            "plan: 'local.optimizer.beta1' is 1.0: expected less than 1.",
        ),
        ({"schedule": {"final": 2}}, "plan: 'schedule.final' is 2: expected 1 or less."),
        ({"local": {"keep_inner": "maybe"}}, "plan: 'local.keep_inner' is 'maybe': expected true or false."),
        ({"local": 3}, "plan: 'local' is 3: expected keys and values."),
        ({"name": 3}, "plan: 'name' is 3: expected text."),
        (
            {"membership": {"allow": ["abc"]}},
            "plan: 'membership.allow.0' is 'abc': expected text to match pattern '^[0-9a-f]{64}$'.",
        ),
    ],
)
def test_messages(data: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(data)
    assert str(caught.value) == message


def test_every_fault_has_a_line() -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse({"seed": -1, "topology": "ring", "rouns": {}})
    first, *rest = str(caught.value).splitlines()
    assert first == "plan:"
    assert len(rest) == 3
    assert {line.split("'")[1] for line in rest} == {"seed", "topology", "rouns"}


def test_long_values_are_cut() -> None:
    assert shown("x" * 500) == "'" + "x" * 76 + "..."
    with pytest.raises(PlanError) as caught:
        Plan.parse({"seed": "9" * 5000})
    assert len(str(caught.value)) < 250


def test_did_you_mean() -> None:
    assert did_you_mean("stepz", ["steps", "seed"]) == " Did you mean 'steps'? Known: seed, steps."
    assert did_you_mean("run", ["run-3f9a2b", "urn"]) == " Did you mean 'run-3f9a2b'? Known: run-3f9a2b, urn."
    many = [f"name{i:02}" for i in range(20)]
    assert did_you_mean("name007", many) == " Did you mean 'name07'?"
    assert did_you_mean("zzz", many).endswith("name10, name11 and 8 more.")
    assert did_you_mean("stepz", ["steps"], within="local.") == " Did you mean 'local.steps'? Known: steps."
    assert did_you_mean("zzz", ["b", "a"]) == " Known: a, b."
    assert did_you_mean("zzz", []) == ""


def test_differences() -> None:
    assert list(differences({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": 1, "c": [2]}, "e": 3})) == [
        ("a.c", [1], [2]), ("d", 2, None), ("e", None, 3),
    ]  # fmt: skip
    assert not list(differences({"a": {}}, {"a": {}}))
