from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from manyhands.engine.parallel import Parallelized
from manyhands.engine.run import train
from manyhands.engine.step import training_step
from manyhands.errors import DataError
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import VALIDATION
from manyhands.tasks.survival import FAMILY, cox_loss, predict

BRCA = Path(__file__).parents[3] / "shared" / "data" / "tcga-brca"


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
            "task": {"name": "survival", **task},
            "rounds": {"total": 1},
            "local": {"steps": steps, "batch_size": batch_size, "optimizer": {"lr": lr, "weight_decay": 0}},
            "evaluation": {"max_batches": 1000},
        }
    )


def by_hand(people: list[tuple[float, int, bool]]) -> float:
    """Breslow's negative log partial likelihood per person, term by term."""
    terms = [
        math.log(sum(math.exp(other) for other, later, _ in people if later >= time)) - score
        for score, time, event in people
        if event
    ]
    return sum(terms) / len(people)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 5), st.booleans()), min_size=1, max_size=20))
def test_the_loss_is_the_partial_likelihood_with_ties(people: list[tuple[float, int, bool]]) -> None:
    scores, times, events = (
        torch.tensor([p[i] for p in people], dtype=d)
        for i, d in enumerate((torch.float64, torch.float64, torch.bool))
    )
    assert float(cox_loss(scores, times, events)) == pytest.approx(by_hand(people), abs=1e-9)


def test_the_loss_is_stable_and_does_not_depend_on_a_constant() -> None:
    times, events = torch.arange(5.0), torch.tensor([True, False, True, True, False])
    scores = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0], requires_grad=True)
    loss = cox_loss(scores, times, events)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert float(gradient.sum()) == pytest.approx(0, abs=1e-6)
    loss, scores = loss.detach(), scores.detach()
    far = cox_loss(scores * 500, times, events)
    assert math.isfinite(float(far))
    assert float(cox_loss(scores + 1000, times, events)) == pytest.approx(float(loss), abs=1e-3)


def test_batches_without_an_event_change_nothing_and_average_as_any_other(tmp_path: Path) -> None:
    plan = plan_of()
    FAMILY.prepare(plan, tmp_path)
    task = FAMILY.open(plan, tmp_path)
    model = task.build_model()
    batch = dict(task.batch(np.arange(8)))
    quiet = {**batch, "event": torch.zeros(8, dtype=torch.bool)}
    step = training_step(task, Parallelized.whole(model), [quiet, quiet], optimizer=None)
    assert float(step.loss) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())
    alone = training_step(task, Parallelized.whole(model), [batch], optimizer=None)
    gradient = next(model.parameters()).grad.clone()  # type: ignore[union-attr]
    both = training_step(task, Parallelized.whole(model), [quiet, batch], optimizer=None)
    assert float(both.loss) == pytest.approx(float(alone.loss) / 2)
    torch.testing.assert_close(next(model.parameters()).grad, gradient / 2)


def test_the_default_finds_the_hazards_that_made_the_data(tmp_path: Path) -> None:
    plan = plan_of(steps=300, batch_size=128, lr=0.03)
    evaluations = []
    result = train(
        plan, tmp_path, on_event=lambda e: evaluations.append(e) if e["kind"] == "evaluation" else None
    )
    assert evaluations[-1]["metrics"]["c_index"] > 0.72
    weights = load_file(result.checkpoint / "model.safetensors")
    assert set(weights) == {"last.weight"}, "the likelihood does not depend on a bias"
    np.testing.assert_allclose(weights["last.weight"][0], [1, -0.7, 0.5, 0, 0, 0], atol=0.15)
    row = {f"x{i}": 0.0 for i in range(6)}
    risks = predict(result.checkpoint, [row, {**row, "x0": 1.0}, {**row, "x1": "1"}])
    assert risks[1] - risks[0] == pytest.approx(1, abs=0.15)
    assert risks[2] - risks[0] == pytest.approx(-0.7, abs=0.15)


def people(path: Path, *more: str) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    lines = [f"{generator.normal():.4f},{i % 7 + 1},{'dead' if i % 3 else 'alive'}" for i in range(60)]
    path.write_text("\n".join(["age,days,status", *lines, *more]))
    return {"time": "days", "event": "status == dead", "table": {"files": [str(path)]}}


def test_events_may_be_a_comparison_and_times_keep_their_ties(tmp_path: Path) -> None:
    plan = plan_of(**people(tmp_path / "t.csv", "1,,dead"))
    FAMILY.prepare(plan, tmp_path / "m")
    task = FAMILY.open(plan, tmp_path / "m")
    batch = task.batch(np.arange(task.samples()))
    assert batch["time"].dtype == torch.float64
    assert set(batch["time"].tolist()) == set(map(float, range(1, 8)))
    assert 0.5 < float(batch["event"].double().mean()) < 0.8
    assert task.samples() + task.samples(VALIDATION) == 60
    assert json.loads((tmp_path / "m" / "record.json").read_text())["dropped"]["missing target"] == 1


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ({"event": "status"}, "1,2,dead", r"t\.csv:2: the event is '(alive|dead)', and 0 or 1 was expected"),
        ({}, "1,-2,dead", r"t\.csv:62: the time is '-2'"),
        ({}, "1,soon,dead", r"t\.csv:62: the time is 'soon'"),
        ({"time": "day"}, "1,2,dead", r"task\.time names the column 'day'.*Did you mean 'days'"),
        ({"event": "status == gone"}, "1,2,dead", "no training row has an event"),
    ],
)
def test_bad_tables_say_what_to_do(tmp_path: Path, task: dict[str, Any], row: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        FAMILY.prepare(plan_of(**(people(tmp_path / "t.csv", row) | task)), tmp_path / "m")


@pytest.mark.skipif(not BRCA.is_dir(), reason="needs ../shared/data/tcga-brca")
def test_tcga_brca_as_published(tmp_path: Path) -> None:
    """FLamby Fed-TCGA-BRCA, linear Cox on 39 features: FedAdagrad's concordance is .813, FedYogi's .815."""
    task = {
        "time": "T",
        "event": "E",
        "table": {"files": [str(BRCA / "brca.csv")]},
        "split": {"file": str(BRCA / "train_test_split.csv"), "key": "pid", "column": "fold"},
    }
    evaluations = []
    result = train(
        plan_of(steps=300, lr=0.01, **task),
        tmp_path,
        on_event=lambda e: evaluations.append(e) if e["kind"] == "evaluation" else None,
    )
    record = json.loads((tmp_path / "materials" / "record.json").read_text())
    assert (record["training"], record["validation"], record["left_out_by_split"]) == (866, 222, 8)
    assert load_file(result.checkpoint / "model.safetensors")["last.weight"].shape == (1, 39)
    assert 0.78 < evaluations[-1]["metrics"]["c_index"] < 0.87
