"""Every rule of what goes together: a plan just inside, and one just outside with its message."""

from typing import Any

import pytest

from manyhands.errors import PlanError
from manyhands.plan.choices import CHOICES
from manyhands.plan.compatibility import RULES, check, faults, idle_settings
from manyhands.plan.presets import PRESETS
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan

A, B = "aa" * 32, "bb" * 32
PLAIN_SGD = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.0}

# rule -> (a plan that it lets pass, a plan that it refuses, words of its message)
CASES: dict[str, list[tuple[dict[str, Any], dict[str, Any], str]]] = {
    "no_lag": [
        ({"rounds": {"lag": 0}}, {"rounds": {"lag": 1}}, "'rounds.lag' is 1.*not supported yet; expected 0")
    ],
    "no_fragments": [
        ({"rounds": {"fragments": 1}}, {"rounds": {"fragments": 2}}, "'rounds.fragments' is 2.*not supp")
    ],
    "no_late_apply": [
        ({}, {"rounds": {"apply_after_steps": 1}}, "'rounds.apply_after_steps' is 1.*expected 0")
    ],
    "no_changing_buffers": [
        ({}, {"buffers": "average"}, "'buffers' is 'average'.*not supported yet.*expected 'refuse'"),
        ({}, {"buffers": "keep_local"}, "'buffers' is 'keep_local'"),
    ],
    "no_local_data": [
        (
            {"data": {"kind": "local"}, "task": {"name": "dummy"}},
            {"data": {"kind": "local"}},
            "'data.kind' is 'local'",
        ),
        (
            {},
            {"data": {"kind": "local"}, "task": {"name": "custom", "target": "a:b"}},
            "this one is 'custom'",
        ),
    ],
    "shards_hold_samples": [
        (
            {"data": {"shards": "dir"}},
            {"data": {"shards": "dir"}, "task": {"name": "dummy"}},
            "'data.shards' is 'dir', and the task dummy has no samples",
        )
    ],
    "broken_shards_are_of_shards": [
        (
            {"data": {"shards": "dir", "on_broken": "skip"}},
            {"data": {"on_broken": "skip"}},
            "'data.on_broken' is 'skip', which is for shards",
        )
    ],
    "control_variate_needs_plain_sgd": [
        (
            {"local": {"control_variate": True, "optimizer": PLAIN_SGD}},
            {"local": {"control_variate": True}},
            "'local.control_variate' is True with adamw.*plain SGD",
        ),
        (
            {"local": {"optimizer": {**PLAIN_SGD, "momentum": 0.9}}},
            {"local": {"control_variate": True, "optimizer": {**PLAIN_SGD, "momentum": 0.9}}},
            "momentum 0.9",
        ),
        (
            {"local": {"optimizer": {**PLAIN_SGD, "clip_norm": 1.0}}},
            {"local": {"control_variate": True, "optimizer": {**PLAIN_SGD, "clip_norm": 1.0}}},
            "clip_norm 1.0",
        ),
    ],
    "control_variate_without_proximal": [
        (
            {"local": {"proximal": 0.1, "optimizer": PLAIN_SGD}},
            {"local": {"proximal": 0.1, "control_variate": True, "optimizer": PLAIN_SGD}},
            "'local.proximal' is 0.1 with control_variate",
        )
    ],
    "gradient_without_schedule": [
        (
            {"local": {"kind": "gradient"}},
            {"local": {"kind": "gradient"}, "schedule": {"kind": "cosine"}},
            "'schedule.kind' is 'cosine'",
        ),
        (
            {"schedule": {"warmup_steps": 5}},
            {"local": {"kind": "gradient"}, "schedule": {"warmup_steps": 5}},
            "5 warm-up steps",
        ),
    ],
    "schedule_fits_the_run": [
        (
            {"schedule": {"kind": "cosine", "warmup_steps": 599}},
            {"schedule": {"kind": "cosine", "warmup_steps": 600}},
            r"'schedule.warmup_steps' is 600, but the schedule has 600 steps in all \(.*\): give "
            r"schedule\.warmup_steps=60, or another below 600\.$",
        ),
        (
            {"schedule": {"kind": "wsd", "warmup_steps": 40, "total_steps": 100, "decay_steps": 60}},
            {"schedule": {"kind": "wsd", "warmup_steps": 41, "total_steps": 100, "decay_steps": 60}},
            "'schedule.decay_steps' is 60",
        ),
    ],
    "mesh_publishes_no_change": [
        (
            {"topology": "mesh", "codec": {"name": "int8", "error_feedback": True}},
            {"topology": "mesh", "change_codec": {"name": "bf16"}},
            "'change_codec.name' is 'bf16', but in a mesh nobody publishes",
        ),
        ({"change_codec": {"name": "int8"}}, {"topology": "mesh", "change_codec": {"name": "int8"}}, "mesh"),
    ],
    "dummy_tensors_fit": [
        (
            {"task": {"name": "dummy", "parameters": 3, "tensors": 3}},
            {"task": {"name": "dummy", "parameters": 3, "tensors": 4}},
            "'task.tensors' is 4, but there are only 3",
        )
    ],
    "model_is_described": [
        (
            {"task": {"name": "language_model", "model_type": "llama", "model": {"hidden_size": 8}}},
            {"task": {"name": "language_model", "model_type": "llama"}},
            "'task.model_type' is 'llama', but task.model does not say how large",
        ),
        (
            {"task": {"name": "language_model", "model": {}}},
            {"task": {"name": "language_model", "model_type": "llama", "model": {}}},
            "hidden_size",
        ),
    ],
    "heads_divide_the_width": [
        (
            {"task": {"name": name, "model": {"width": 12, "heads": 3}}},
            {"task": {"name": name, "model": {"width": 12, "heads": 5}}},
            "'task.model.heads' is 5.*width 12: choose 1, 2, 3, 4, 6 or 12",
        )
        for name in ("grids", "chess_endgames")
    ],
    "grid_sets_are_distinct": [
        (
            {
                "task": {
                    "name": "grids",
                    "evaluation": [{"name": "a", "path": "x"}, {"name": "b", "path": "x"}],
                }
            },
            {
                "task": {
                    "name": "grids",
                    "evaluation": [{"name": "a", "path": "x"}, {"name": "a", "path": "y"}],
                }
            },
            "has the name 'a', which is taken",
        ),
        (
            {},
            {"task": {"name": "grids", "evaluation": [{"name": "training", "path": "x"}]}},
            "'training', which is taken",
        ),
    ],
    "generated_grids_are_used": [
        (
            {"task": {"name": "grids", "training": "x", "generated": {"examples": 3}}},
            {
                "task": {
                    "name": "grids",
                    "training": "x",
                    "evaluation": [{"name": "a", "path": "x"}],
                    "generated": {"examples": 3},
                }
            },
            "all sets are read from files",
        )
    ],
    "clients_within_bounds": [
        (
            {"membership": {"min_clients": 4, "max_clients": 4}},
            {"membership": {"min_clients": 5, "max_clients": 4}},
            "'membership.min_clients' is 5, more than max_clients 4",
        )
    ],
    "quorum_can_be_reached": [
        (
            {"rounds": {"quorum": 3}, "membership": {"min_clients": 3}},
            {"rounds": {"quorum": 3}, "membership": {"min_clients": 2}},
            "'rounds.quorum' is 3.*at most 2",
        )
    ],
    "allow_list_is_filled": [
        (
            {"membership": {"kind": "allow_list", "allow": [A, B], "min_clients": 2}},
            {"membership": {"kind": "allow_list"}},
            "'membership.allow' has 0 keys.*show-identity",
        ),
        (
            {"membership": {"kind": "allow_list", "allow": [A]}},
            {"membership": {"kind": "allow_list", "allow": [A, A]}},
            "names 1 keys twice",
        ),
        (
            {"membership": {"kind": "allow_list", "allow": [A]}},
            {"membership": {"kind": "allow_list", "allow": [A], "min_clients": 2}},
            "has 1 keys, but min_clients is 2",
        ),
    ],
    "deadlines_in_order": [
        (
            {"rounds": {"deadline_floor_s": 5, "deadline_ceiling_s": 5}},
            {"rounds": {"deadline_floor_s": 6, "deadline_ceiling_s": 5}},
            "'rounds.deadline_floor_s' is 6.0, above deadline_ceiling_s 5.0",
        )
    ],
    "suspicion_before_loss": [
        (
            {"rounds": {"suspected_after_s": 4.9, "lost_after_s": 5}},
            {"rounds": {"suspected_after_s": 5, "lost_after_s": 5}},
            "'rounds.suspected_after_s' is 5.0, not below lost_after_s 5.0",
        )
    ],
}

# path of the setting -> (the choice that ignores it, one that uses it), each with the setting given
IDLE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local.optimizer.momentum": (
        {"local": {"optimizer": {"name": "adamw", "momentum": 0.9}}},
        {"local": {"optimizer": {"name": "sgd", "momentum": 0.9}}},
    ),
    "local.optimizer.beta2": (
        {"local": {"optimizer": {"name": "sgd", "beta2": 0.5}}},
        {"local": {"optimizer": {"name": "adamw", "beta2": 0.5}}},
    ),
    "local.optimizer": (
        {"local": {"kind": "gradient", "optimizer": {"lr": 0.5}}},
        {"local": {"kind": "steps", "optimizer": {"lr": 0.5}}},
    ),
    "local.keep_inner": (
        {"local": {"kind": "gradient", "keep_inner": False}},
        {"local": {"keep_inner": False}},
    ),
    "local.proximal": ({"local": {"kind": "gradient", "proximal": 0.1}}, {"local": {"proximal": 0.1}}),
    "local.control_variate": (
        {"local": {"kind": "gradient", "control_variate": True}},
        {"local": {"control_variate": True, "optimizer": PLAIN_SGD}},
    ),
    "schedule.total_steps": (
        {"schedule": {"total_steps": 900}},
        {"schedule": {"kind": "linear", "total_steps": 900}},
    ),
    "schedule.decay_steps": (
        {"schedule": {"kind": "cosine", "decay_steps": 9}},
        {"schedule": {"kind": "wsd", "decay_steps": 9}},
    ),
    "codec.error_feedback": (
        {"codec": {"error_feedback": True}},
        {"codec": {"name": "int8", "error_feedback": True}},
    ),
    "codec.block": ({"codec": {"name": "bf16", "block": 64}}, {"codec": {"name": "int8", "block": 64}}),
    "change_codec.error_feedback": (
        {"change_codec": {"error_feedback": True}},
        {"change_codec": {"name": "bf16", "error_feedback": True}},
    ),
    "outer.momentum": (
        {"outer": {"name": "adamw", "momentum": 0.9}},
        {"outer": {"name": "sgd", "momentum": 0.9}},
    ),
    "outer.bias_correction": (
        {"outer": {"name": "nesterov", "bias_correction": False}},
        {"outer": {"name": "adamw", "bias_correction": False}},
    ),
    "membership.allow": (
        {"membership": {"allow": [A]}},
        {"membership": {"kind": "allow_list", "allow": [A]}},
    ),
    "task.tokenizer.vocabulary_size": (
        {"task": {"name": "language_model", "tokenizer": {"kind": "byte", "vocabulary_size": 300}}},
        {"task": {"name": "language_model", "tokenizer": {"vocabulary_size": 300}}},
    ),
}


FROM_WEIGHTS: dict[str, Any] = {"task": {"name": "language_model", "weights": "lab/small"}}


def language_model(**settings: Any) -> dict[str, Any]:
    return {"task": {"name": "language_model", **settings}}


CASES |= {
    "weights_bring_their_model": [
        (
            FROM_WEIGHTS,
            language_model(weights="lab/small", model={"n_layer": 2}),
            "'task.weights' is 'lab/small'",
        )
    ],
    "tokens_are_those_of_the_weights": [
        (
            FROM_WEIGHTS,
            language_model(weights="lab/small", tokenizer={}),
            "'task.tokenizer.kind' is 'bpe', but 'task.weights' is",
        ),
        (
            language_model(text={"kind": "tokens", "path": "a.bin"}, tokenizer={"kind": "byte"}),
            language_model(text={"kind": "tokens", "path": "a.bin"}),
            "'task.tokenizer.kind' is 'bpe', but 'task.text.kind' is 'tokens'",
        ),
    ],
    "tokenizer_file_is_named": [
        (
            language_model(tokenizer={"kind": "file", "path": "gpt2"}),
            language_model(tokenizer={"kind": "file"}),
            "task.tokenizer.path is missing",
        )
    ],
    "adapter_has_weights": [
        (
            language_model(weights="lab/small", adapter={"name": "lora"}),
            language_model(adapter={"name": "lora"}),
            "'task.adapter.name' is 'lora', but the weights that it would freeze are random",
        )
    ],
    "validation_has_one_source": [
        (
            language_model(text={"validation_path": "b.txt"}),
            language_model(text={"validation_path": "b.txt", "validation_share": 0.2}),
            "task.text.validation_path names the validation text",
        )
    ],
}


def test_every_rule_has_its_cases() -> None:
    assert set(CASES) == {rule.__name__ for rule in RULES}
    assert all(rule.__doc__ for rule in RULES)


@pytest.mark.parametrize(
    ("rule", "good", "bad", "message"),
    [(rule, *case) for rule, cases in CASES.items() for case in cases],
)
def test_rule(rule: str, good: dict[str, Any], bad: dict[str, Any], message: str) -> None:
    assert faults(Plan.parse(good)) == ()
    found = {r.__name__: fault for r in RULES for fault in [r(Plan.parse(bad))] if fault}
    assert set(found) == {rule}
    with pytest.raises(PlanError, match=message):
        check(Plan.parse(bad))


@pytest.mark.parametrize("path", IDLE)
def test_a_setting_that_would_be_ignored_is_refused(path: str) -> None:
    idle, used = IDLE[path]
    with pytest.raises(PlanError, match=f"'{path}' is .* has no use for it") as caught:
        check(Plan.parse(idle))
    assert "\n" not in str(caught.value)
    check(Plan.parse(used))


def test_the_table_of_idle_settings_has_no_dead_entry() -> None:
    """Every entry of the table refuses the setting when it is given another value than its default."""
    for path, choice in CHOICES.items():
        for chosen, names in choice.idle.items():
            for name in names:
                data: dict[str, Any] = {choice.tag: chosen, name: other_value(path, name)}
                for part in reversed(path.split(".")):
                    data = {part: data}
                if path.startswith("task."):
                    data["task"]["name"] = "language_model"
                assert any(f"'{path}.{name}'" in fault for fault in idle_settings(Plan.parse(data))), (
                    path,
                    name,
                )


def other_value(path: str, name: str) -> Any:
    if name in ("optimizer",):
        return {"lr": 0.123}
    if name == "allow":
        return [A]
    value: Any = Plan().model_dump()
    for part in (*path.split("."), name):
        value = value[part]
    if isinstance(value, bool):
        return not value
    counts = {"total_steps": 77, "decay_steps": 7, "block": 32, "vocabulary_size": 300}
    counts |= {"max_bytes": 9, "max_documents": 9, "max_tokens": 9}
    texts = {"on_broken": "skip"} | dict.fromkeys(
        ("path", "end", "column", "subset", "split", "validation_path", "validation_split", "shards"), "other"
    )
    return (counts | texts).get(name, 0.25)


def test_all_faults_are_told_at_once() -> None:
    plan = Plan.parse({"rounds": {"lag": 1, "quorum": 9}, "outer": {"beta1": 0.5}})
    with pytest.raises(PlanError) as caught:
        check(plan, where="my.yaml")
    first, *rest = str(caught.value).splitlines()
    assert first == "my.yaml:"
    assert len(rest) == 3


def test_the_defaults_and_all_presets_go_together() -> None:
    check(Plan())
    for name in PRESETS:
        check(resolve({"preset": name}))
        check(resolve({"preset": name, "topology": "mesh"}))
