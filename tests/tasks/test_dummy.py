from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from manyhands.coordination.types import Assignment, IndexRange
from manyhands.errors import PlanError
from manyhands.plan.schema import Codec, LocalWork, Plan
from manyhands.plan.tasks import DummyTask
from manyhands.plan.wire import check_header, snapshot_schema, update_schema
from manyhands.tasks.dummy import FAMILY, LARGEST_VALUE, DummyWork, parameter_table


def assignment(seed: int = 5) -> Assignment:
    ranges = (IndexRange(epoch=0, start=10, stop=22),)
    return Assignment(
        id="0-0", round=0, client="ab", steps=3, batch_size=4, ranges=ranges, weight=1, seed=seed
    )


def plan_with(parameters: int = 700_000, tensors: int = 3, delay_s: float = 0.0, **more: Any) -> Plan:
    return Plan(task=DummyTask(parameters=parameters, tensors=tensors, delay_s=delay_s), **more)


def decoded_norm(path: Path, block: int) -> float:
    tensors = load_file(path)
    total = 0.0
    for name, tensor in tensors.items():
        if not name.startswith("delta/") or name.endswith(".scale"):
            continue
        values = tensor.double()
        if f"{name}.scale" in tensors:
            values = values * tensors[f"{name}.scale"].double().repeat_interleave(block)[: len(values)]
        total += float(values.square().sum())
    return total**0.5


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("control", [False, True])
def test_an_update_has_the_schema_of_the_plan_and_its_true_norm(
    tmp_path: Path, codec: Any, control: bool
) -> None:
    plan = plan_with(codec=Codec(name=codec), local=LocalWork(control_variate=control))
    parameters = FAMILY.prepare(plan, tmp_path).parameters
    path = tmp_path / "update.safetensors"
    claims = DummyWork(plan, parameters).write_update(assignment(), path)
    assert claims is not None
    check_header(path, update_schema(plan, parameters))
    assert claims.norm == pytest.approx(decoded_norm(path, 256), rel=1e-5)
    assert claims.norm == pytest.approx(LARGEST_VALUE * (700_000 / 3) ** 0.5, rel=0.01)  # uniform values
    assert claims.samples == 12
    for name, tensor in load_file(path).items():
        limit = 127 if tensor.dtype == torch.int8 else LARGEST_VALUE
        assert torch.isfinite(tensor.float()).all(), name
        assert tensor.float().abs().max() <= limit


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    work = DummyWork(plan_with(5000), parameter_table(DummyTask(parameters=5000, tensors=3)))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        work.write_update(assignment(seed), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_first_weights_are_zeros_in_the_schema_of_a_snapshot(tmp_path: Path) -> None:
    plan = plan_with(1000, 3, local=LocalWork(control_variate=True))
    made = FAMILY.prepare(plan, tmp_path)
    check_header(made.first_weights, snapshot_schema(plan, made.parameters))
    assert [p.shape for p in made.parameters] == [(334,), (333,), (333,)]
    assert all(not tensor.any() for tensor in load_file(made.first_weights).values())
    assert made.samples == 1_000_000
    assert made.materials == {}


def test_work_takes_its_time_and_can_be_abandoned(tmp_path: Path) -> None:
    plan = plan_with(1000, delay_s=0.15)
    work = DummyWork(plan, FAMILY.prepare(plan, tmp_path).parameters)
    claims = work.write_update(assignment(), tmp_path / "update")
    assert claims is not None
    assert claims.work_ms >= 150
    started = time.monotonic()
    asked = iter([False, True, True])
    assert work.write_update(assignment(), tmp_path / "abandoned", abandoned=lambda: next(asked)) is None
    assert time.monotonic() - started < 0.14
    assert not (tmp_path / "abandoned").exists()


def test_abandoned_while_writing_leaves_no_file(tmp_path: Path) -> None:
    plan = plan_with(1000)
    asked = iter([False, True])
    work = DummyWork(plan, FAMILY.prepare(plan, tmp_path).parameters)
    assert work.write_update(assignment(), tmp_path / "update", abandoned=lambda: next(asked)) is None
    assert not (tmp_path / "update").exists()


def test_what_does_not_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"task\.tensors is 5, more than task\.parameters 4"):
        FAMILY.prepare(plan_with(4, 5), tmp_path)
    with pytest.raises(PlanError, match="no model"):
        FAMILY.open(plan_with(), tmp_path)
    with pytest.raises(PlanError, match="'language_model'"):
        FAMILY.prepare(Plan(), tmp_path)


def test_writing_costs_little_more_than_the_bytes(tmp_path: Path) -> None:
    """The pattern is made once per update, not once per tensor: many tensors take no longer than few."""
    plan = plan_with(1_000_000, 1000)
    made = FAMILY.prepare(plan, tmp_path)
    calls = []
    original = np.random.default_rng
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", lambda seed: calls.append(seed) or original(seed))
        DummyWork(plan, made.parameters).write_update(assignment(), tmp_path / "update")
    assert len(calls) == 1
