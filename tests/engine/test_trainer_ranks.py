"""A piece of a client's work by several processes gives what one process makes of it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.engine.trainer import EngineTrainer
from manyhands.engine.world import World
from manyhands.errors import PlanError
from manyhands.plan.schema import Plan
from manyhands.tasks.registry import family_of

SCRIPT = Path(__file__).with_name("work_ranks.py")
LLAMA = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
Case = dict[str, Any]


def case(world: Any, plan: Plan, **more: Any) -> Case:
    """Two pieces of work, the second with the first one's inner state."""
    world = dataclasses.replace(world, plan=plan)
    return {
        "plan": plan,
        "materials": world.directory,
        "weights": world.weights(),
        "inner": None,
        "works": [world.work(number, 2) for number in range(2)],
        "correction": None,
        "proximal": 0.0,
        "micro_batch_size": None,
        "tensor_parallelism": 1,
        "abandon_at": None,
        **more,
    }


def with_llama(world: Any, place: Path) -> Any:
    """The same text and a model that says how it is divided."""
    task = world.plan.task.model_copy(update={"model_type": "llama", "model": LLAMA})
    plan = world.plan.model_copy(update={"task": task})
    place.mkdir()
    return dataclasses.replace(
        world, plan=plan, directory=place, prepared=family_of(plan).prepare(plan, place)
    )


def cases(world: Any, place: Path) -> dict[str, Case]:
    weights = world.weights()
    llama = with_llama(world, place)
    adamw = world.plan
    uneven = world.with_local(batch_size=5)
    gradient = world.with_local(batch_size=5, kind="gradient")
    sgd = world.with_optimizer(name="sgd", momentum=0.9)
    correction = {name: torch.full_like(tensor, 1e-3) for name, tensor in weights.items()}
    return {
        "adamw": case(world, adamw),
        "uneven": case(world, uneven, micro_batch_size=1),
        "gradient": case(world, gradient, micro_batch_size=1),
        "steered": case(world, sgd, correction=correction, proximal=0.1),
        "tensor": case(llama, llama.plan, tensor_parallelism=2, proximal=0.1),
        "abandoned": case(world, uneven, micro_batch_size=1, abandon_at=3),
    }


@pytest.fixture(scope="module")
def made(world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Case], dict[str, Any]]:
    """The cases, and of each what both ranks made of it."""
    directory = tmp_path_factory.mktemp("ranks")
    given = cases(world, directory / "llama")
    for name, each in given.items():
        torch.save(each, directory / f"{name}.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(directory), str(rank), "2", *given],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(180) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    return given, {
        name: [torch.load(directory / f"{name}-{rank}.pt", weights_only=False) for rank in range(2)]
        for name in given
    }


@pytest.mark.parametrize("name", ["adamw", "uneven", "gradient", "steered", "tensor"])
def test_two_processes_make_what_one_makes(made: Any, name: str) -> None:
    given, results = made
    each = given[name]
    plan, inner = each["plan"], None
    alone = EngineTrainer(family_of(plan).open(plan, each["materials"]), plan)
    for number, (assignment, terms) in enumerate(each["works"]):
        if plan.local.kind == "gradient":
            expected = alone.gradient(each["weights"], assignment)
        else:
            steering = {key: each[key] for key in ("correction", "proximal")}
            expected = alone.train(each["weights"], inner, assignment, terms, **steering)
        for rank in range(2):
            agree(results[name][rank][number], expected, 1e-5)
        inner = expected.inner


def agree(ours: Any, theirs: Any, tolerance: float) -> None:
    assert (ours.tokens, ours.samples, ours.steps) == (theirs.tokens, theirs.samples, theirs.steps)
    assert ours.loss == pytest.approx(theirs.loss, rel=tolerance)
    for one, other in [(ours.tensors, theirs.tensors), (ours.inner or {}, theirs.inner or {})]:
        assert one.keys() == other.keys()
        for name in other:
            torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def test_all_ranks_give_work_up_together(made: Any) -> None:
    """Rank 0 is told of it when it asks for the third time; it has three micro-batches in a step, rank 1 two."""
    first, second = made[1]["abandoned"]
    assert first[0] == second[0] == "abandoned when asked 3 times"
    each = made[0]["abandoned"]
    alone = EngineTrainer(family_of(each["plan"]).open(each["plan"], each["materials"]), each["plan"])
    expected = alone.train(each["weights"], None, *each["works"][1])
    for after in (first[1], second[1]):  # nothing of it is left
        agree(after, expected, 1e-5)


def test_more_replicas_than_samples_of_a_step_are_refused(world: Any) -> None:
    with pytest.raises(PlanError, match=r"local.batch_size=4 of this run cannot be divided among 5 replicas"):
        EngineTrainer(world.task(), world.plan, World(data_size=5))
