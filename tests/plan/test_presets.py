"""Presets: all resolve, and hold what their papers say."""

import pytest

from manyhands.errors import PlanError
from manyhands.plan.presets import PRESETS, values_of
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_resolves_and_says_where_it_is_from(name: str) -> None:
    plan = resolve({"preset": name})
    assert plan.preset == name
    assert plan != Plan(preset=name)
    assert PRESETS[name].summary.endswith(".")
    assert PRESETS[name].source


def test_published_values() -> None:
    fedsgd, fedavg, fedprox, scaffold, fedadam, diloco = (
        resolve({"preset": name}) for name in ("fedsgd", "fedavg", "fedprox", "scaffold", "fedadam", "diloco")
    )
    assert (fedsgd.local.kind, fedsgd.outer.name, fedsgd.outer.lr) == ("gradient", "adamw", 1e-4)
    assert fedsgd.outer.bias_correction
    for plan in (fedavg, fedprox, scaffold, fedadam):
        assert (plan.local.optimizer.name, plan.local.optimizer.used_momentum) == ("sgd", 0.0)
        assert (plan.local.optimizer.weight_decay, plan.local.optimizer.clip_norm) == (0.0, 0.0)
    for plan in (fedavg, fedprox, scaffold):
        assert (plan.outer.name, plan.outer.lr, plan.outer.momentum) == ("sgd", 1.0, 0.0)
    assert (fedavg.merge.weight, fedavg.local.proximal) == ("samples", 0.0)
    assert fedprox.local.proximal == 0.01
    assert scaffold.local.control_variate
    assert (fedadam.outer.name, fedadam.outer.lr, fedadam.outer.bias_correction) == ("adamw", 0.01, False)
    assert (fedadam.outer.beta1, fedadam.outer.beta2, fedadam.outer.epsilon) == (0.9, 0.999, 1e-8)
    assert (diloco.local.optimizer.name, diloco.local.steps, diloco.local.optimizer.lr) == (
        "adamw",
        500,
        4e-4,
    )
    assert (diloco.outer.name, diloco.outer.lr, diloco.outer.momentum) == ("nesterov", 0.7, 0.9)


def test_what_the_plan_says_wins() -> None:
    plan = resolve({"preset": "diloco", "local": {"steps": 30}, "outer": {"momentum": 0.5}})
    assert (plan.local.steps, plan.outer.momentum) == (30, 0.5)
    assert (plan.outer.name, plan.outer.lr, plan.local.optimizer.lr) == ("nesterov", 0.7, 4e-4)


def test_another_optimizer_does_not_inherit_the_presets_numbers() -> None:
    plan = resolve({"preset": "diloco", "outer": {"name": "adamw"}, "local": {"optimizer": {"name": "sgd"}}})
    assert (plan.outer.lr, plan.outer.momentum) == (Plan().outer.lr, 0.0)
    assert plan.local.optimizer.lr == Plan().local.optimizer.lr
    assert plan.local.steps == 500
    assert resolve({"preset": "fedsgd", "local": {"kind": "steps"}}).local.steps == 10
    assert resolve({"preset": "scaffold", "local": {"kind": "gradient"}}).local.kind == "gradient"


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"no preset 'dilco'\. Did you mean 'diloco'\?"):
        resolve({"preset": "dilco"})
    assert resolve({"preset": None}) == resolve({"preset": ""}) == Plan()


def test_values_are_copies() -> None:
    values_of("diloco")["outer"]["lr"] = 99
    assert values_of("diloco")["outer"]["lr"] == 0.7
