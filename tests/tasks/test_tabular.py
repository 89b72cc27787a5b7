from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from manyhands.engine.evaluation import evaluate
from manyhands.engine.run import TrainResult, train
from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.tasks import survival
from manyhands.tasks.protocol import TRAINING, VALIDATION, Task, Warns
from manyhands.tasks.tabular import FAMILY, Tabular, predict

HEART = Path(__file__).parents[3] / "shared" / "data" / "heart-disease"
HEART_COLUMNS = (
    *("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg"),
    *("thalach", "exang", "oldpeak", "slope", "ca", "thal", "num"),
)
MATERIALS = {
    "training.safetensors",
    "validation.safetensors",
    "statistics.json",
    "table.json",
    "record.json",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of(steps: int = 10, batch_size: int = 16, lr: float = 0.01, seed: int = 3, **task: Any) -> Plan:
    return Plan.parse(
        {
            "seed": seed,
            "task": {"name": "tabular", **task},
            "rounds": {"total": 1},
            "local": {"steps": steps, "batch_size": batch_size, "optimizer": {"lr": lr, "weight_decay": 0}},
            "evaluation": {"max_batches": 1000},
        }
    )


def figures_of(plan: Plan, directory: Path) -> tuple[TrainResult, dict[str, float]]:
    evaluations = []
    result = train(
        plan, directory, on_event=lambda e: evaluations.append(e) if e["kind"] == "evaluation" else None
    )
    return result, evaluations[-1]["metrics"]


def table(path: Path, rows: int = 200, seed: int = 0) -> str:
    """`color` and `x` tell the kind: a blue of high x is `yes`; some cells are missing."""
    generator = np.random.default_rng(seed)
    lines = ["id,color,x,kind"]
    for i in range(rows):
        color, x = generator.choice(["red", "blue"]), generator.normal(50, 10)
        kind = "yes" if (color == "blue") == (x > 50) else "no"
        lines.append(f"{i},{'?' if i % 20 == 3 else color},{'?' if i % 20 == 7 else f'{x:.3f}'},{kind}")
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def prepared(tmp_path: Path, **task: Any) -> tuple[Plan, Task]:
    plan = plan_of(**task)
    FAMILY.prepare(plan, tmp_path / "m")
    return plan, FAMILY.open(plan, tmp_path / "m")


def csv_task(file: str, **more: Any) -> dict[str, Any]:
    features = {"without": ["id"], "categorical": ["color"], **more.pop("features", {})}
    return {"target": "kind", "table": {"files": [file]}, "features": features, **more}


def test_materials_weights_and_table_belong_together(tmp_path: Path) -> None:
    task = csv_task(table(tmp_path / "t.csv"))
    made = FAMILY.prepare(plan_of(**task), tmp_path / "one")
    state = torch.get_rng_state()
    FAMILY.prepare(plan_of(**task), tmp_path / "two")
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert set(made.materials) == MATERIALS
    for name in (*MATERIALS, made.first_weights.name):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    opened = FAMILY.open(plan_of(**task), tmp_path / "one")
    model = opened.build_model()
    weights = load_file(made.first_weights)
    model.load_state_dict(weights)
    assert [(p.name, p.shape) for p in made.parameters] == [
        (n, tuple(t.shape)) for n, t in model.named_parameters()
    ]
    assert opened.samples() == made.samples
    assert opened.samples() + opened.samples(VALIDATION) == 200
    record = json.loads(made.materials["record.json"].read_text())
    assert (record["rows"], record["training"]) == (200, made.samples)


def test_a_batch_has_features_and_class_numbers(tmp_path: Path) -> None:
    _, task = prepared(tmp_path, **csv_task(table(tmp_path / "t.csv")))
    batch = task.batch(np.array([4, 0], dtype=np.int64))
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "features": ((2, 3), torch.float32),
        "target": ((2,), torch.int64),
    }
    assert torch.equal(batch["features"][1], task.batch(np.array([0]))["features"][0])


@pytest.mark.parametrize(
    ("policy", "rows", "features"), [("mean", 200, 3), ("indicator", 200, 5), ("drop", 180, 3)]
)
def test_missing_values_by_policy(tmp_path: Path, policy: str, rows: int, features: int) -> None:
    task = csv_task(table(tmp_path / "t.csv"), features={"on_missing": policy})
    _, opened = prepared(tmp_path, **task)
    assert opened.samples() + opened.samples(VALIDATION) == rows
    assert opened.batch(np.array([0]))["features"].shape == (1, features)
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert record["dropped"]["missing value"] == 200 - rows


def test_the_default_learns_and_predicts_as_evaluated(tmp_path: Path) -> None:
    plan = plan_of(steps=300)
    result, figures = figures_of(plan, tmp_path / "run")
    assert figures["accuracy"] > 0.75
    assert figures["auc"] > 0.8
    assert figures["brier"] < 0.18
    opened = FAMILY.open(plan, tmp_path / "run" / "materials")
    batch = opened.batch(np.arange(opened.samples(VALIDATION)), VALIDATION)
    statistics = json.loads((result.checkpoint / "statistics.json").read_text())
    rows = [
        {
            f["name"]: value * f["deviation"] + f["mean"]
            for f, value in zip(statistics["features"], row, strict=True)
        }
        for row in batch["features"].tolist()
    ]
    probabilities = predict(result.checkpoint, rows)
    assert (probabilities.argmax(1) == batch["target"].numpy()).mean() == pytest.approx(figures["accuracy"])
    np.testing.assert_allclose(probabilities.sum(1), 1)


def test_a_linear_model_cannot_do_what_hidden_layers_can(tmp_path: Path) -> None:
    _, linear = figures_of(plan_of(steps=300, hidden_sizes=[]), tmp_path / "linear")
    assert linear["accuracy"] < 0.7


def test_regression_in_the_units_of_its_target(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 2))
    y = 1e6 + 2000 * x[:, 0] - 1000 * x[:, 1] + 100 * generator.normal(size=300)
    lines = ["a,b,y", *(f"{a},{b},{c}" for (a, b), c in zip(x, y, strict=True))]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    task = {
        "problem": "regression",
        "target": "y",
        "hidden_sizes": [],
        "table": {"files": [str(tmp_path / "t.csv")]},
    }
    result, figures = figures_of(plan_of(steps=400, lr=0.02, **task), tmp_path / "run")
    assert figures["r2"] > 0.99
    assert 70 < figures["rmse"] < 130
    found = predict(result.checkpoint, [{"a": 1, "b": "0.0"}, {"a": None, "b": 0}])
    assert found[0] == pytest.approx(1e6 + 2000, abs=60)
    assert found[1] == pytest.approx(1e6 + 2000 * x[:, 0].mean(), abs=150)


def test_three_classes_and_one_that_training_does_not_have(tmp_path: Path) -> None:
    lines = ["x,part,y"]
    lines += [f"{i % 3 + i / 1000},{'test' if i % 5 == 0 else 'train'},{'abc'[i % 3]}" for i in range(90)]
    (tmp_path / "t.csv").write_text("\n".join([*lines, "1,test,d"]))
    task = {"target": "y", "table": {"files": [str(tmp_path / "t.csv")]}, "split": {"column": "part"}}
    result, figures = figures_of(plan_of(steps=300, lr=0.03, **task), tmp_path / "run")
    assert figures["accuracy"] > 0.9
    assert predict(result.checkpoint, [{"x": 2.04}]).argmax() == 2
    record = json.loads((tmp_path / "run" / "materials" / "record.json").read_text())
    assert record["dropped"]["target not in the training rows"] == 1


def test_metrics_of_two_ranks_are_those_of_one(tmp_path: Path) -> None:
    _, task = prepared(tmp_path, **csv_task(table(tmp_path / "t.csv")))
    model = task.build_model().eval()
    indices = np.arange(task.samples(VALIDATION))
    alone, *ranks = (task.metrics(VALIDATION) for _ in range(4))
    with torch.no_grad():
        for start in range(0, len(indices), 7):
            batch = task.batch(indices[start : start + 7], VALIDATION)
            alone.add(model, batch)
            ranks[start // 7 % 2].add(model, batch)
    states = [rank.state() for rank in ranks]
    assert states[2] == {}, "a rank without samples has nothing to say"
    for rank in ranks:
        rank.merge(states)
        assert rank.values() == pytest.approx(alone.values())
    assert set(alone.values()) == {"accuracy", "auc", "brier"}
    assert evaluate(task, model, 1000, 16).metrics == pytest.approx(alone.values())


def test_agreed_statistics_replace_the_own_ones(tmp_path: Path) -> None:
    file = table(tmp_path / "t.csv")
    prepared(tmp_path, **csv_task(file))
    agreed = json.loads((tmp_path / "m" / "statistics.json").read_text())
    agreed["features"][0] |= {"mean": 0.0, "deviation": 10.0} if agreed["features"][0]["name"] == "x" else {}
    agreed["features"][-1] |= {"mean": 0.0, "deviation": 10.0}
    (tmp_path / "agreed.json").write_text(json.dumps(agreed))
    task = csv_task(file, features={"statistics": str(tmp_path / "agreed.json")})
    _, opened = prepared(tmp_path, **task)
    assert 3 < float(opened.batch(np.arange(50))["features"][:, -1].mean()) < 7
    assert json.loads((tmp_path / "m" / "statistics.json").read_text()) == agreed


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"target": "kund"}, "no column 'kund'.*Did you mean 'kind'"),
        (
            {"features": {"categorical": []}},
            r"t\.csv:2: the column 'color' has '(red|blue)'.*task\.features\.categorical",
        ),
        ({"features": {"without": ["colour"]}}, "names the column 'colour'.*Did you mean 'color'"),
        (
            {"features": {"without": [], "columns": ["kind"], "categorical": []}},
            "which is what is to be predicted",
        ),
        ({"features": {"without": ["id", "color"]}}, "names 'color', which is no feature"),
        ({"problem": "regression"}, r"t\.csv:2: the target is '(yes|no)', and a finite number"),
        ({"problem": "regression", "target": "x > 1"}, "which makes classes"),
        (
            {"target": "x > 1000", "features": {"without": [], "columns": ["id"], "categorical": []}},
            "has 1 different values",
        ),
    ],
)
def test_bad_tables_say_what_to_do(tmp_path: Path, task: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, **csv_task(table(tmp_path / "t.csv"), **task))


def test_broken_rows_are_skipped_and_recorded(tmp_path: Path) -> None:
    file = Path(table(tmp_path / "t.csv"))
    lines = file.read_text().splitlines()
    lines[10], lines[11], lines[12] = "9,red,much,yes", "10,red", "11,red,3,"
    file.write_text("\n".join(lines))
    task = csv_task(str(file))
    with pytest.raises(DataError, match=r"t\.csv:12: 2 cells"):
        prepared(tmp_path, **task)
    task["table"]["on_broken"] = "skip"
    _, opened = prepared(tmp_path, **task)
    assert isinstance(opened, Warns)
    (told,) = opened.warnings
    assert told.startswith("rows that are left out: 2 as broken (")
    assert "t.csv:12: 2 cells" in told
    assert told.endswith("1 for a missing target")
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert record["broken"]["count"] == 2
    assert record["dropped"]["missing target"] == 1
    assert record["training"] + record["validation"] == 197


def test_broken_files_are_left_out_and_recorded(tmp_path: Path) -> None:
    task = csv_task(table(tmp_path / "t.csv"))
    (tmp_path / "empty.csv").touch()
    task["table"]["files"] += [str(tmp_path / "empty.csv"), str(tmp_path / "missing.csv")]
    with pytest.raises(DataError, match=r"empty\.csv is empty"):
        prepared(tmp_path, **task)
    task["table"]["on_broken"] = "skip"
    _, opened = prepared(tmp_path, **task)
    assert isinstance(opened, Warns)
    (told,) = opened.warnings
    assert told.startswith("files that are left out: 2 as broken (")
    assert "empty.csv is empty" in told
    assert "missing.csv cannot be read: No such file" in told
    record = json.loads((tmp_path / "m" / "record.json").read_text())
    assert [source["file"] for source in record["source"]] == ["t.csv"]
    assert len(record["broken_files"]) == 2


def test_predictions_need_every_column_and_their_own_task(tmp_path: Path) -> None:
    plan, task = prepared(tmp_path, **csv_task(table(tmp_path / "t.csv")))
    model = task.build_model()
    task.save_pretrained(model.state_dict(), tmp_path / "saved")
    assert predict(tmp_path / "saved", [{"color": "green", "x": ""}]).shape == (1, 2)
    with pytest.raises(DataError, match="row 1 has no column 'color'"):
        predict(tmp_path / "saved", [{"color": "red", "x": 1}, {"x": 1}])
    with pytest.raises(DataError, match="row 0: the column 'x' has 'much'"):
        predict(tmp_path / "saved", [{"color": "red", "x": "much"}])
    with pytest.raises(DataError, match="holds a model of task 'tabular'"):
        survival.predict(tmp_path / "saved", [])
    with pytest.raises(DataError, match="that a run of a table task wrote"):
        predict(tmp_path, [])
    with pytest.raises(PlanError, match="this is the family of tabular"):
        FAMILY.open(Plan(), tmp_path / "m")
    (tmp_path / "m" / "training.safetensors").unlink()
    with pytest.raises(DataError, match="fetch the run's materials again"):
        FAMILY.open(plan, tmp_path / "m")
    assert isinstance(task, Tabular)
    assert task.samples(TRAINING) > 0


@pytest.mark.skipif(not HEART.is_dir(), reason="needs ../shared/data/heart-disease")
def test_heart_disease_as_published(tmp_path: Path) -> None:
    """FLamby Fed-Heart-Disease, pooled logistic regression: accuracy .795 on 254 test rows of its own split."""
    task = {
        "target": "num > 0",
        "hidden_sizes": [],
        "table": {
            "files": [str(file) for file in sorted(HEART.glob("*.data"))],
            "column_names": HEART_COLUMNS,
        },
        "features": {
            "without": ["slope", "ca", "thal"],
            "categorical": ["cp", "restecg"],
            "drop_first": True,
            "on_missing": "drop",
            "standardize": "all",
        },
        "split": {"share": 0.34},
    }
    found = []
    for seed in (42, 43):
        plan = plan_of(steps=300, batch_size=32, lr=0.01, seed=seed, **task)
        result, figures = figures_of(plan, tmp_path / str(seed))
        found.append(figures)
        record = json.loads((tmp_path / str(seed) / "materials" / "record.json").read_text())
        assert record["training"] + record["validation"] == 740
        assert load_file(result.checkpoint / "model.safetensors")["last.weight"].shape == (1, 13)
    assert 0.77 < np.mean([f["accuracy"] for f in found]) < 0.84
    assert 0.85 < np.mean([f["auc"] for f in found]) < 0.91
