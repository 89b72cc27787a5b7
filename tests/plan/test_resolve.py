"""From data and files to plans: one object, one hash, and every bad input a PlanError."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.config import LocalPath
from manyhands.errors import PlanError
from manyhands.plan.compose import load_plan
from manyhands.plan.presets import PRESETS
from manyhands.plan.resolve import MAX_FILE_BYTES, dump_plan, new_run_id, plan_hash, resolve
from manyhands.plan.schema import Plan


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ------------------------------------------------------------------------------ data
def test_nothing_said_is_the_default_plan() -> None:
    assert resolve({}) == Plan()


def test_a_task_without_a_name_is_the_default_one() -> None:
    plan = resolve({"task": {"block_size": 32}})
    assert plan.task.name == "language_model"
    assert plan == Plan.parse({"task": {"name": "language_model", "block_size": 32}})


def test_a_small_gpt2_stays_small() -> None:
    plan = resolve({"task": {"model": {"n_layer": 2}}})
    assert plan.task.model == {"n_layer": 2, "n_head": 4, "n_embd": 128}  # type: ignore[union-attr]
    llama = resolve({"task": {"model_type": "llama", "model": {"hidden_size": 8}}})
    assert llama.task.model == {"hidden_size": 8}  # type: ignore[union-attr]


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_resolving_again_changes_nothing(name: str | None) -> None:
    plan = resolve({"preset": name, "task": {"model": {"n_layer": 3, "x": [1, 1.5, None]}}})
    assert resolve(plan.model_dump()) == plan
    assert resolve(plan.model_dump(mode="json")) == plan


@pytest.mark.parametrize("data", [[], "x", None, 3])
def test_only_mappings(data: Any) -> None:
    with pytest.raises(PlanError, match=r"^here: expected keys and values"):
        resolve(data, where="here")


@pytest.mark.parametrize(
    "settings",
    [
        {"x": float("nan")},
        {"x": "\ud800"},
        {"x": object()},
        {"x": {1, 2}},
        {"x": 10**400},
        {"x": {3: 4}},
        {"x": b""},
    ],
)
def test_what_has_no_canonical_form_is_no_plan(settings: Any) -> None:
    with pytest.raises(PlanError):
        resolve({"task": {"name": "custom", "target": "a:b", "settings": settings}})


# ------------------------------------------------------------------------------ hash and run id
def test_the_hash_of_a_fixed_plan_is_fixed() -> None:
    """A change of the schema, or of a default, is a change of every plan: it must be meant."""
    assert plan_hash(Plan()) == "6970ec6c59e6be9a1173a75303143ccc4f0c5d73489780a63855036e0dc1315b"
    assert (
        plan_hash(resolve({"preset": "diloco", "topology": "mesh", "seed": 7}))
        == "d53e61f6d7a83866af0a278e8c93ffc06273d36f0a78a0dc235e3a66e687d4b1"
    )


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def another(path: tuple[str, ...], value: Any) -> Any:
    """A valid value other than the one given, found from the schema's own type."""
    model: Any = Plan()
    for part in path[:-1]:
        model = model[part] if isinstance(model, dict) else getattr(model, part)
    annotation = None if isinstance(model, dict) else type(model).model_fields[path[-1]].annotation
    if get_origin(annotation) is Literal:
        others = [choice for choice in get_args(annotation) if choice != value]
        return others[0] if others else None
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value / 2 + 0.3
        case ():
            return ["ab" * 32]
        case str():
            return value + "x"
    if path == ("task", "adapter"):
        return {}
    if path[-1] == "momentum":
        return 0.5
    return "other" if {str, LocalPath} & {*get_args(annotation)} or path[-1] in ("preset", "run_id") else 77


@pytest.mark.parametrize("path", [path for path, _ in leaves(Plan().model_dump())], ids=".".join)
def test_the_hash_changes_with_every_field(path: tuple[str, ...]) -> None:
    data: Any = Plan().model_dump()
    section = data
    for part in path[:-1]:
        section = section[part]
    value = another(path, section[path[-1]])
    if value is None or path == ("task", "name"):
        assert path in [("task", "name"), ("merge", "rule")]  # one choice, or other fields altogether
        return
    section[path[-1]] = value
    changed = Plan.parse(data)
    assert changed != Plan()
    assert plan_hash(changed) != plan_hash(Plan())


def test_the_hash_does_not_depend_on_the_way() -> None:
    a = resolve({"outer": {"lr": 1}, "rounds": {"total": 5}})
    b = resolve({"rounds": {"total": 5}, "outer": {"lr": 1.0, "name": "sgd"}})
    assert plan_hash(a) == plan_hash(b)
    assert plan_hash(resolve({"task": {"name": "dummy"}})) != plan_hash(Plan())


def test_hashes_are_the_same_in_another_process() -> None:
    code = "from manyhands.plan.resolve import *; print(plan_hash(resolve({'preset': 'fedadam'})))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == plan_hash(resolve({"preset": "fedadam"}))


def test_run_ids() -> None:
    assert new_run_id(Plan(run_id="fixed")) == "fixed"
    ids = {new_run_id(Plan(name="a" * 64)) for _ in range(20)}
    assert len(ids) == 20
    for run_id in ids:
        Plan(run_id=run_id)
        assert run_id.startswith("a" * 57 + "-")
    assert new_run_id(Plan(name="demo")).startswith("demo-")


# ------------------------------------------------------------------------------ files
def test_a_file_gives_the_same_plan_as_its_data(tmp_path: Path) -> None:
    path = written(tmp_path, "preset: diloco\nouter: {momentum: 0.5}\nlocal:\n  optimizer: {lr: 1e-3}\n")
    data = {"preset": "diloco", "outer": {"momentum": 0.5}, "local": {"optimizer": {"lr": 0.001}}}
    assert load_plan(path) == resolve(data)
    assert load_plan(str(path)) == resolve(data)


def test_an_empty_file_is_no_plan(tmp_path: Path) -> None:
    for text in ("", "# nothing yet\n"):
        with pytest.raises(
            PlanError, match=r"says nothing\. The shortest plan is one line: `preset: diloco`"
        ):
            load_plan(written(tmp_path, text))
    assert load_plan(written(tmp_path, "{}\n")) == Plan()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.e5", 100000.0),
        ("-2E+2", -200.0),
        (".5", 0.5),
        ("12", 12),
        ("1e", "1e"),
        ("2020-01-01", "2020-01-01"),
        ("'1e-3'", "1e-3"),
        ("null", None),
        ("true", True),
        ("e5", "e5"),
        ("1e5x", "1e5x"),
    ],
)
def test_scalars_are_what_they_look_like(tmp_path: Path, text: str, value: Any) -> None:
    path = written(tmp_path, f"task: {{name: custom, target: 'a:b', settings: {{x: {text}}}}}\n")
    found = load_plan(path).task.settings["x"]  # type: ignore[union-attr]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("name", [None, *PRESETS])
def test_a_dumped_plan_loads_as_the_same(tmp_path: Path, name: str | None) -> None:
    settings = {"x": [1, 0.1, 1e-30, True, None, "on", "1e5", "ä", "null", "a: b\n"], "y": {}}
    plan = resolve({"preset": name, "task": {"name": "custom", "target": "a:b", "settings": settings}})
    again = load_plan(written(tmp_path, dump_plan(plan)))
    assert again == plan
    assert plan_hash(again) == plan_hash(plan)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(lr=st.floats(min_value=0, exclude_min=True, allow_infinity=False), seed=st.integers(0, 2**63 - 1))
def test_numbers_survive_the_file(tmp_path_factory: pytest.TempPathFactory, lr: float, seed: int) -> None:
    plan = resolve({"outer": {"lr": lr}, "seed": seed})
    path = written(tmp_path_factory.getbasetemp(), dump_plan(plan))
    assert plan_hash(load_plan(path)) == plan_hash(plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nname: x\nseed: 2\n", "line 3, column 1: the key 'seed' is there twice"),
        ("local:\n  steps: 1\n  steps: 1\n", "line 3, column 3: the key 'steps' is there twice"),
        ("task: !!python/object/apply:os.system ['true']\n", "names code to run"),
        ("task: !!python/name:os.system\n", "names code to run"),
        ("task: !custom {name: dummy}\n", "the tag !custom names code to run"),
        ("name: !!binary aGk=\n", "names code to run"),
        ("seed: ${oc.env:HOME}\n", "'seed' is '.*': an interpolation"),
        ("task: {name: custom, target: 'a:b', settings: {x: ['${now:}']}}\n", r"'task\.settings\.x\.0' is"),
        ("task: {_target_: os.system}\n", r"'task\._target_' is 'os.system': this names code to run"),
        ("task: {name: custom, target: 'a:b', settings: {y: [{_partial_: true}]}}\n", "names code to run"),
        ("task: {model: {auto_map: {AutoModel: a.b}}}\n", "names code to run"),
        ("task: {model: {trust_remote_code: true}}\n", "names code to run"),
        ("task: {model: {attn_implementation: owner/kernel}}\n", "names code to fetch and run"),
        ("task: {model: {_attn_implementation: owner/kernel}}\n", "names code to fetch and run"),
        ("a: &a\n  b: 1\nc:\n  <<: *a\n", "unknown key"),
        ("a: [1, 2\n", "line 2"),
        ("[1, 2]\n", "expected keys and values, not list"),
        ("3\n", "expected keys and values, not int"),
        ("1: x\n", "the key 1 is not text"),
        ("{[1]: x}\n", "not text|unhashable"),
        ("&a [*a]\n", "expected keys and values"),
        ("local: &a {x: *a}\n", "levels"),
        (b"name: \xff\xfe\n", "not readable as YAML"),
        ("name: a\x00b\n", "not readable as YAML"),
        ("---\nname: a\n---\nname: b\n", "expected a single document"),
        ("rounds: {total: 0}\n", "'rounds.total' is 0"),
        ("rounds: {lag: 1}\n", "'rounds.lag' is 1"),
        ("stpes: 3\n", "unknown key 'stpes'"),
        ("preset: nope\n", "no preset 'nope'"),
        ("[" * 5000, "nested too deeply|line"),
        ("name: " + "x" * MAX_FILE_BYTES, "more than .* bytes"),
        ("x: " + "1" * 5000, "no plan|not readable|unknown key"),
    ],
    ids=lambda value: value[:28] if isinstance(value, str) else "bytes",
)
def test_bad_files(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(written(tmp_path, text))
    assert str(tmp_path) in str(caught.value) or "preset" in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_a_bomb_of_aliases_is_refused_quickly(tmp_path: Path) -> None:
    text = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    with pytest.raises(PlanError, match="that is no plan"):
        load_plan(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"there is no plan file .*preset: diloco"):
        load_plan(tmp_path / "none.yaml")
    with pytest.raises(PlanError, match="cannot read the plan file"):
        load_plan(tmp_path)
