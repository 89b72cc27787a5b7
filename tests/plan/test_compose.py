"""Hydra's composition and plan files end in the same object; every fault is a PlanError in words."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import manyhands
from manyhands.errors import PlanError
from manyhands.plan.compose import apply_overrides, compose, compose_data, load_plan
from manyhands.plan.resolve import plan_hash, resolve
from manyhands.plan.schema import Plan

CONF = Path(manyhands.__file__).parent / "conf"
CONFIGS = sorted(path.stem for path in CONF.glob("*.yaml"))
CHOICES = ("task", "optimizer", "outer", "codec")
"""Groups whose options are the names of a section's choice; the others are recipes: tests/ui/test_config.py."""
OPTIONS = sorted(f"{group}={path.stem}" for group in CHOICES for path in CONF.glob(f"{group}/*.yaml"))


def file_of(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


# ------------------------------------------------------------------------------ what is packaged
def test_the_defaults_come_from_the_schema() -> None:
    assert compose() == Plan(name="train")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_packaged_config_is_a_plan(name: str) -> None:
    assert compose(config_name=name).name == name.replace("_", "-")


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_a_group_composes(option: str) -> None:
    more = ["task.target=lab:Task"] if option == "task=custom" else []
    group, choice = option.split("=")
    plan = compose([option, *more])
    section = plan.local.optimizer if group == "optimizer" else getattr(plan, group)
    assert section.name == choice


def test_groups_do_not_repeat_the_defaults_of_the_schema() -> None:
    """Each value of a group's file, but for the choice itself, differs from the schema's default."""
    for option in OPTIONS:
        group, choice = option.split("=")
        path = "local.optimizer" if group == "optimizer" else group
        said = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text())
        default: Any = Plan().model_dump()
        for part in path.split("."):
            default = default[part]
        repeated = {key for key, value in said.items() if key != "name" and default.get(key) == value}
        assert repeated == set(), option


def test_the_demo_is_diloco_for_few_rounds() -> None:
    plan = compose(config_name="demo")
    assert plan.preset == "diloco"
    assert (plan.outer.name, plan.outer.lr, plan.outer.momentum) == ("nesterov", 0.7, 0.5)
    mesh = compose(config_name="mesh")
    assert mesh.model_copy(update={"name": "demo", "topology": "star"}) == plan


# ------------------------------------------------------------------------------ the same object
SAME: list[tuple[list[str], dict[str, Any]]] = [
    ([], {}),
    (["seed=7", "topology=mesh"], {"seed": 7, "topology": "mesh"}),
    (["preset=diloco", "local.steps=5"], {"preset": "diloco", "local": {"steps": 5}}),
    (
        ["outer.lr=1e-3", "schedule.total_steps=null"],
        {"outer": {"lr": 0.001}, "schedule": {"total_steps": None}},
    ),
    (["task=dummy", "task.samples=50"], {"task": {"name": "dummy", "samples": 50}}),
    (["task.name=dummy"], {"task": {"name": "dummy"}}),
    (["task.model.n_layer=2"], {"task": {"model": {"n_layer": 2}}}),
    (["codec=int8", "codec.block=64"], {"codec": {"name": "int8", "error_feedback": True, "block": 64}}),
    (
        [f"membership.allow=[{'ab' * 32}]", "membership.kind=allow_list"],
        {"membership": {"kind": "allow_list", "allow": ["ab" * 32]}},
    ),
    (["+local.steps=4", "++local.batch_size=2"], {"local": {"steps": 4, "batch_size": 2}}),
    (
        ["local.batch-size=4", "rounds.max-failed=1"],
        {"local": {"batch_size": 4}, "rounds": {"max_failed": 1}},
    ),
    (
        ["task=custom", "task.target='lab:Task'", "task.settings.a-b={c: [1, x]}", "task.settings.d=''"],
        {"task": {"name": "custom", "target": "lab:Task", "settings": {"a-b": {"c": [1, "x"]}, "d": ""}}},
    ),
]


@pytest.mark.parametrize(
    ("overrides", "data"), SAME, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_overrides_files_and_python_give_the_same_plan(
    tmp_path: Path, overrides: list[str], data: dict[str, Any]
) -> None:
    expected = resolve({"name": "train", **data})
    assert compose(overrides) == expected
    assert load_plan(file_of(tmp_path, {"name": "train", **data})) == expected
    assert load_plan(file_of(tmp_path, {"name": "train"}), overrides) == expected
    assert plan_hash(compose(overrides)) == plan_hash(expected)


def test_overrides_win_over_the_file_and_the_preset(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"preset": "diloco", "outer": {"momentum": 0.5}, "local": {"steps": 9}})
    plan = load_plan(path, ["outer.momentum=0.6", "local.steps=10", "local.steps=11"])
    assert (plan.outer.momentum, plan.local.steps, plan.outer.lr) == (0.6, 11, 0.7)
    assert load_plan(path, ["preset=fedavg"]).local.optimizer.name == "sgd"


def test_naming_the_same_choice_again_keeps_its_settings(tmp_path: Path) -> None:
    """The file's momentum belongs to nesterov, which only the preset names."""
    path = file_of(tmp_path, {"preset": "diloco", "outer": {"momentum": 0.5}})
    assert load_plan(path, ["outer.name=nesterov"]).outer.momentum == 0.5
    assert compose(["outer.name=nesterov"], "demo").outer.momentum == 0.5
    assert compose(["outer.name=sgd"], "demo").outer == Plan().outer
    assert compose(["outer=adamw"], "demo").outer.lr == 0.01


def test_a_removal_goes_back_to_the_preset_or_the_default(tmp_path: Path) -> None:
    assert compose(["~outer.momentum"], "demo").outer.momentum == 0.9
    assert compose(["~schedule"], "demo").schedule == Plan().schedule
    path = file_of(tmp_path, {"local": {"steps": 9, "batch_size": 3}})
    assert load_plan(path, ["~local.steps"]).local == Plan.parse({"local": {"batch_size": 3}}).local


def test_data_given_is_not_changed() -> None:
    data = {"local": {"steps": 9}}
    assert apply_overrides(data, ["local.steps=3", "seed=2"]) == {"local": {"steps": 3}, "seed": 2}
    assert data == {"local": {"steps": 9}}
    assert apply_overrides(data, []) == data


def test_composed_data_holds_only_what_differs() -> None:
    assert compose_data() == {"name": "train", "task": {"name": "language_model"}}


# ------------------------------------------------------------------------------ a directory of one's own
@pytest.fixture
def own(tmp_path: Path) -> Path:
    directory = tmp_path / "it's, my conf"
    (directory / "size").mkdir(parents=True)
    (directory / "lab.yaml").write_text(
        "defaults: [{size: small}, {codec: bf16}, _self_]\nname: lab\nrounds: {total: 3}\n"
        "task: {name: language_model, model: {n_head: '${task.model.n_layer}'}}\n"
    )
    for name, layers in (("small", 1), ("large", 8)):
        (directory / "size" / f"{name}.yaml").write_text(f"# @package task.model\nn_layer: {layers}\n")
    return directory


def test_own_configs_and_groups(own: Path) -> None:
    plan = compose(["seed=3"], "lab", own)
    assert (plan.name, plan.seed, plan.codec.name, plan.rounds.total) == ("lab", 3, "bf16", 3)
    assert plan.task.model == {"n_layer": 1, "n_head": 1, "n_embd": 128}  # type: ignore[union-attr]
    large = compose(["size=large", "codec=int8"], "lab", own)
    assert large.task.model["n_head"] == 8  # type: ignore[union-attr]
    assert large.codec.name == "int8"
    assert compose(["+size=large"], "train", own).task.model["n_layer"] == 8  # type: ignore[union-attr]
    assert compose([], "demo", own) == compose([], "demo")


def test_own_faults(own: Path) -> None:
    with pytest.raises(PlanError, match=r"no config 'lap'\. Did you mean 'lab'\?"):
        compose([], "lap", own)
    with pytest.raises(PlanError, match=r"size 'lrge' does not exist\. Did you mean 'large'\?"):
        compose(["size=lrge"], "lab", own)
    (own / "odd.yaml").write_text("name: ${nowhere}\n")
    with pytest.raises(PlanError, match=r"config 'odd': .*nowhere"):
        compose([], "odd", own)
    (own / "cut.yaml").write_text("name: [\n")
    with pytest.raises(PlanError, match="config 'cut'"):
        compose([], "cut", own)
    (own / "list.yaml").write_text("[1, 2]\n")
    with pytest.raises(PlanError, match="config 'list'"):
        compose([], "list", own)
    (own / "missing.yaml").write_text("name: ???\n")
    with pytest.raises(PlanError, match="config 'missing'"):
        compose([], "missing", own)
    with pytest.raises(PlanError, match="no directory of configs"):
        compose([], "lab", own / "nowhere")


# ------------------------------------------------------------------------------ faults
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("local.stpes=3", r"unknown key 'local\.stpes'\. Did you mean 'local\.steps'\?"),
        ("lcal.steps=3", r"unknown key 'lcal'\. Did you mean 'local'\?"),
        ("++task.blok_size=3", r"unknown key 'task\.blok_size'\. Did you mean 'task\.block_size'\?"),
        ("local.steps=many", r"'local\.steps' is 'many': expected a whole number"),
        ("local=3", r"'local' is 3: expected"),
        ("topology=msh", r"'topology' is 'msh': expected 'star' or 'mesh'\. Did you mean 'mesh'\?"),
        ("preset=dilco", r"Did you mean 'diloco'\?"),
        ("task=dumy", r"task 'dumy' does not exist\. Did you mean 'dummy'\?"),
        ("codec=int9", r"codec 'int9' does not exist\. Did you mean 'int8'\?"),
        ("rounds.lag=1", "not supported yet"),
        ("local.steps=1,2", "names several values"),
        ("local.steps=range(1,3)", "names several values"),
        ("local.steps", "not KEY=VALUE"),
        ("=3", "not KEY=VALUE"),
        ("", "not KEY=VALUE"),
        ("local.steps=[1", "not KEY=VALUE"),
        ("a b", "not KEY=VALUE"),
        ("hydra.run.dir=/tmp", "setting of Hydra"),
        ("hydra=x", "setting of Hydra"),
        ("name=${oc.env:HOME}", "interpolation"),
        ("task._target_=os.system", "names code to run"),
        ("~local.steps", "takes out what is not there"),
        ("~seed=1", "takes out what is not there"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        compose([override])
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(PlanError, match=message):
        load_plan(file_of(tmp_path, {}), [override])


def test_an_unknown_config() -> None:
    with pytest.raises(PlanError, match=r"there is no config 'trian'\. Did you mean 'train'\?"):
        compose([], "trian")


# ------------------------------------------------------------------------------ Hydra around us
def test_an_application_around_keeps_its_hydra(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("x: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose(["seed=5"]).seed == 5
        with pytest.raises(PlanError):
            compose(["sed=5"])
        assert hydra_compose("app").x == 1
    assert not GlobalHydra.instance().is_initialized()


def test_hydra_is_left_uninitialized() -> None:
    compose()
    assert not GlobalHydra.instance().is_initialized()


def test_hydra_is_loaded_only_when_needed(tmp_path: Path) -> None:
    path = file_of(tmp_path, {"preset": "fedavg"})
    code = (
        "import sys; import manyhands.plan, manyhands.plan.compose; from manyhands.plan.compose import load_plan\n"
        f"load_plan({str(path)!r})\n"
        "print(*[name for name in ('hydra', 'omegaconf', 'torch') if name in sys.modules])\n"
        f"load_plan({str(path)!r}, ['seed=1'])\n"
        "print(*[name for name in ('hydra', 'torch') if name in sys.modules])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["", "hydra"]
