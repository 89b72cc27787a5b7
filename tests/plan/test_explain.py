"""A plan in words: everything documented, everything shown, and the page is the one that is committed."""

from pathlib import Path

import pytest

from manyhands.plan.explain import describe, reference_markdown, render
from manyhands.plan.presets import PRESETS
from manyhands.plan.resolve import plan_hash, resolve
from manyhands.plan.schema import Plan

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "plan.md"
TASKS = [
    {"name": "language_model"},
    {"name": "dummy"},
    {"name": "grids"},
    {"name": "chess_endgames"},
    {"name": "custom", "target": "lab:Task", "settings": {"x": 1}},
]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["name"])
def test_every_setting_is_there_and_documented(task: dict[str, object]) -> None:
    plan = resolve({"task": task})
    settings = {setting.path: setting for setting in describe(plan)}
    flat = {}

    def flatten(value: object, path: str) -> None:
        if isinstance(value, dict) and (
            task["name"] in ("grids", "chess_endgames") or path not in ("task.model", "task.settings")
        ):
            for key, item in value.items():
                flatten(item, f"{path}.{key}".lstrip("."))
        else:
            flat[path] = value

    flatten(plan.model_dump(), "")
    assert {path: setting.value for path, setting in settings.items()} == flat
    undocumented = [path for path, setting in settings.items() if not setting.doc]
    assert undocumented == []


def test_every_section_is_documented() -> None:
    for name, field in Plan.model_fields.items():
        assert field.description, name


def test_what_differs_is_known() -> None:
    assert [setting.path for setting in describe(Plan()) if setting.changed] == []
    plan = resolve({"seed": 7, "outer": {"momentum": 0.5}, "task": {"name": "dummy", "tensors": 2}})
    changed = {
        setting.path: (setting.value, setting.default) for setting in describe(plan) if setting.changed
    }
    assert changed == {
        "seed": (7, 1337),
        "outer.momentum": (0.5, 0.0),
        "task.name": ("dummy", "language_model"),
        "task.tensors": (2, 4),
    }
    custom = describe(resolve({"task": TASKS[-1]}))
    assert {s.path: s.default for s in custom if s.changed}["task.name"] == "language_model"
    assert "Undefined" not in render(resolve({"task": TASKS[-1]}))


@pytest.mark.parametrize("name", PRESETS)
def test_the_text_shows_every_value_and_ends_with_the_hash(name: str) -> None:
    plan = resolve({"preset": name})
    text = render(plan)
    lines = text.splitlines()
    assert lines[-1] == f"plan hash {plan_hash(plan)}"
    assert max(map(len, lines)) <= 110
    by_path = {line[2:].split()[0]: line for line in lines[2:-2] if line[2:3].strip()}
    for setting in describe(plan):
        assert (by_path[setting.path][0] == "*") == setting.changed
    assert f" {plan.outer.lr} " in by_path["outer.lr"]


def test_values_are_shown_as_one_writes_them() -> None:
    text = render(
        resolve({"membership": {"kind": "allow_list", "allow": ["ab" * 32]}, "codec": {"name": "bf16"}})
    )
    assert f"membership.allow                [{'ab' * 32}]\n" in text
    assert "run_id                          null " in text
    assert "local.keep_inner                true " in text
    assert "{n_layer: 4, n_head: 4, n_embd: 128}\n" in text
    assert "Default: fp32." in text


def test_a_narrow_terminal() -> None:
    assert render(Plan(), width=60).endswith(plan_hash(Plan()))


def test_the_committed_page_is_up_to_date() -> None:
    command = (
        "python -c 'from manyhands.plan.explain import *; print(reference_markdown(), end=\"\")' > "
        + str(PAGE)
    )
    assert PAGE.read_text(encoding="utf-8") == reference_markdown(), f"write it anew: {command}"


def test_the_page_names_every_setting_and_preset() -> None:
    page = reference_markdown()
    for task in TASKS:
        for setting in describe(resolve({"task": task})):
            assert f"`{setting.path}`" in page
    for name in PRESETS:
        assert f"| `{name}` |" in page
    for line in page.splitlines():
        if line.startswith("| `"):
            assert line.replace("\\|", "").count("|") == 5, line
