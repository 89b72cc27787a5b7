"""A piece of a client's work by several processes gives what one process makes of it."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.engine.trainer import EngineTrainer
from manyhands.plan.resolve import dump_plan
from manyhands.plan.schema import Plan

Group = Callable[..., list[list[Any]]]


@pytest.fixture
def group(world: Any, tmp_path: Path) -> Group:
    """Let two processes do the works; what each rank made of each."""

    def run(plan: Plan, given: dict[str, Any], kind: str, tensor: int = 1, micro: int = 0) -> list[list[Any]]:
        (tmp_path / "plan.yaml").write_text(dump_plan(plan))
        torch.save(given, tmp_path / "given.pt")
        if not (tmp_path / "materials").exists():
            (tmp_path / "materials").symlink_to(world.directory)
        script = str(Path(__file__).with_name("work_ranks.py"))
        ranks = [
            subprocess.Popen(
                [sys.executable, script, str(tmp_path), str(rank), "2", str(tensor), str(micro), kind]
            )
            for rank in range(2)
        ]
        try:
            assert [rank.wait(120) for rank in ranks] == [0, 0]
        finally:
            for rank in ranks:
                rank.kill()
        return [
            [
                torch.load(tmp_path / f"done-{kind}-{tensor}-{micro}-{rank}-{number}.pt", weights_only=False)
                for number in range(len(given["works"]))
            ]
            for rank in range(2)
        ]

    return run


def close(one: Any, other: Any, tolerance: float) -> None:
    assert (one.tokens, one.samples, one.steps) == (other.tokens, other.samples, other.steps)
    assert one.loss == pytest.approx(other.loss, rel=tolerance)
    pairs = [(one.tensors, other.tensors), *([] if other.inner is None else [(one.inner, other.inner)])]
    for ours, theirs in pairs:
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)


def given_by(world: Any, steps: int, **more: Any) -> dict[str, Any]:
    works = [world.work(number, steps) for number in range(2)]
    return {
        "weights": world.weights(),
        "inner": None,
        "works": works,
        "correction": None,
        "proximal": 0.0,
        **more,
    }


@pytest.mark.parametrize(("batch_size", "micro"), [(4, 0), (5, 1)])
def test_a_gradient_is_that_of_one_process(world: Any, group: Group, batch_size: int, micro: int) -> None:
    plan = world.with_local(batch_size=batch_size)
    world = dataclasses.replace(world, plan=plan)
    given = given_by(world, 2)
    made = group(plan, given, "gradient", micro=micro)
    alone = EngineTrainer(world.task(), plan)
    for number, (assignment, _) in enumerate(given["works"]):
        expected = alone.gradient(given["weights"], assignment)
        for rank in range(2):
            close(made[rank][number], expected, 1e-5)
