"""The table of choices fits the schema, and overlays drop what belonged to the old choice."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from manyhands.plan.choices import CHOICES, overlay
from manyhands.plan.schema import Plan


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    for name, field in model.model_fields.items():
        for member in models_in(field.annotation):
            yield path + name, member
            yield from sections(member, f"{path}{name}.")


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in models_in(part)]


def tagged() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Sections with a Literal name, kind or rule: path, tag, choices."""
    for path, model in sections(Plan):
        for tag in ("name", "kind", "rule"):
            field = model.model_fields.get(tag)
            if field is not None and get_origin(field.annotation) is Literal:
                yield path, tag, get_args(field.annotation)


def test_every_section_with_a_choice_is_in_the_table() -> None:
    assert {path for path, _, _ in tagged()} == set(CHOICES)
    for path, tag, choices in tagged():
        assert CHOICES[path].tag == tag
        assert set(CHOICES[path].idle) <= set(choices) or path == "task"


def test_defaults_are_those_of_the_schema() -> None:
    plan = Plan().model_dump()
    for path, choice in CHOICES.items():
        section: Any = plan
        for part in path.split("."):
            section = section[part]
        if section is None:  # task.adapter, of which there is none by default
            continue
        assert section[choice.tag] == choice.default, path


def test_idle_settings_exist() -> None:
    models = dict(sections(Plan))
    for path, choice in CHOICES.items():
        for names in choice.idle.values():
            assert set(names) <= set(models[path].model_fields) - {choice.tag}, path


def test_mappings_merge_and_the_rest_is_replaced() -> None:
    base = {"seed": 1, "local": {"steps": 5, "batch_size": 2}, "membership": {"allow": ["a", "b"]}}
    over = {"local": {"steps": 6}, "membership": {"allow": ["c"]}, "name": "x"}
    assert overlay(base, over) == {
        "seed": 1,
        "name": "x",
        "local": {"steps": 6, "batch_size": 2},
        "membership": {"allow": ["c"]},
    }
    assert base["local"] == {"steps": 5, "batch_size": 2}
    assert over["local"] == {"steps": 6}


@pytest.mark.parametrize(
    ("base", "over", "merged"),
    [
        ({"outer": {"name": "nesterov", "lr": 0.7}}, {"outer": {"name": "sgd"}}, {"outer": {"name": "sgd"}}),
        (
            {"outer": {"name": "nesterov", "lr": 0.7}},
            {"outer": {"name": "nesterov", "momentum": 0.5}},
            {"outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.5}},
        ),
        # the choice that is not written is the default one
        ({"outer": {"lr": 0.7}}, {"outer": {"name": "sgd"}}, {"outer": {"lr": 0.7, "name": "sgd"}}),
        ({"outer": {"lr": 0.7}}, {"outer": {"name": "adamw"}}, {"outer": {"name": "adamw"}}),
        ({"task": {"block_size": 8}}, {"task": {"name": "dummy"}}, {"task": {"name": "dummy"}}),
        (
            {"local": {"steps": 5, "proximal": 0.1, "optimizer": {"name": "sgd"}}},
            {"local": {"kind": "gradient"}},
            {"local": {"steps": 5, "kind": "gradient"}},
        ),
        (
            {"membership": {"kind": "allow_list", "allow": ["a"], "min_clients": 3}},
            {"membership": {"kind": "open"}},
            {"membership": {"kind": "open", "min_clients": 3}},
        ),
        (
            {"schedule": {"kind": "wsd", "warmup_steps": 9, "decay_steps": 5}},
            {"schedule": {"kind": "cosine"}},
            {"schedule": {"kind": "cosine", "warmup_steps": 9}},
        ),
        # another kind of model has other keys
        (
            {"task": {"model": {"n_layer": 2}, "block_size": 8}},
            {"task": {"model_type": "llama", "model": {"hidden_size": 4}}},
            {"task": {"model_type": "llama", "model": {"hidden_size": 4}, "block_size": 8}},
        ),
        (
            {"task": {"model": {"n_layer": 2, "n_head": 2}}},
            {"task": {"model_type": "gpt2", "model": {"n_layer": 4}}},
            {"task": {"model_type": "gpt2", "model": {"n_layer": 4, "n_head": 2}}},
        ),
        ({"outer": "odd"}, {"outer": {"name": "sgd"}}, {"outer": {"name": "sgd"}}),
        ({"outer": {"name": "sgd"}}, {"outer": 3}, {"outer": 3}),
        ({"local": {"kind": "steps"}}, {"local": {"kind": ["odd"]}}, {"local": {"kind": ["odd"]}}),
    ],
)
def test_a_new_choice_drops_what_belonged_to_the_old(base: Any, over: Any, merged: Any) -> None:
    assert overlay(base, over) == merged


TREES: Any = st.recursive(
    st.integers(), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(MAPPINGS, MAPPINGS)
def test_overlays_are_idempotent(a: Any, b: Any) -> None:
    assert overlay(a, a) == a
    assert overlay(a, {}) == a
    assert overlay({}, a) == a
    assert overlay(overlay(a, b), b) == overlay(a, b)
