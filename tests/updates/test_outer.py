"""Outer steps against their vectors, against torch's optimizers, and in pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhands.coordination.types import OuterTerms
from manyhands.plan import wire
from manyhands.updates.outer import advance_arrays, apply_arrays, empty_like, fresh_outer


def step(plan, parameters, terms, merged, public, outer):
    change = empty_like(wire.change_schema(plan, parameters))
    after = empty_like(wire.outer_schema(plan, parameters))
    new = empty_like(wire.snapshot_schema(plan, parameters))
    advance_arrays(
        plan, parameters, terms, merged=merged, public=public, outer=outer,
        change_out=change, outer_out=after, public_out=new,
    )  # fmt: skip
    applied = empty_like(wire.snapshot_schema(plan, parameters))
    apply_arrays(plan, parameters, public=public, change=change, public_out=applied)
    assert all(applied[name].tobytes() == new[name].tobytes() for name in new)
    return new, after


@pytest.mark.parametrize("number", range(8))
def test_outer_steps_equal_the_vectors(vectors, unhex, make, bits, number):
    case = vectors("outer")[number]
    settings = dict(case["settings"])
    block = settings.pop("int8_block", None)
    codec = {"name": "int8", "block": block, "error_feedback": True} if block else {}
    plan = make.plan(outer=settings, change_codec=codec)
    public = {"w": unhex(case["public"])}
    parameters = make.parameters({"w": public["w"].shape})
    outer = fresh_outer(plan, parameters)
    for expected in case["steps"]:
        terms = OuterTerms(**{name: float.fromhex(text) for name, text in expected["terms"].items()})
        merged = {"delta/w": unhex(expected["merged"])}
        public, outer = step(plan, parameters, terms, merged, public, outer)
        assert bits(public["w"]) == bits(unhex(expected["public"]))
        for name in wire.moment_names(plan.outer):
            assert bits(outer[f"outer/{name}/w"]) == bits(unhex(expected[name]))
        if block:
            assert bits(outer["outer/residual/delta/w"]) == bits(unhex(expected["residual"]))


@pytest.mark.parametrize(
    ("outer", "reference"),
    [
        ({"name": "sgd", "lr": 0.3}, lambda p: torch.optim.SGD(p, lr=0.3)),
        ({"name": "sgd", "lr": 0.3, "momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9)),
        (
            {"name": "nesterov", "lr": 0.3, "momentum": 0.9},
            lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, nesterov=True),
        ),
        (
            {"name": "adamw", "lr": 1e-2, "beta2": 0.95, "weight_decay": 0.1},
            lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        ),
    ],
)
def test_outer_steps_agree_with_torch(make, outer, reference):
    plan = make.plan(outer=outer)
    source = np.random.default_rng(0)
    public = {"w": source.normal(size=(40, 30)).astype(np.float32)}
    parameters = make.parameters({"w": (40, 30)})
    leaf = torch.nn.Parameter(torch.from_numpy(public["w"].copy()))
    optimizer, state = reference([leaf]), fresh_outer(plan, parameters)
    for t in range(20):
        gradient = source.normal(size=(40, 30)).astype(np.float32)
        leaf.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        terms = make.terms(plan, t).outer
        public, state = step(plan, parameters, terms, {"delta/w": gradient}, public, state)
    assert np.abs(public["w"] - leaf.detach().numpy()).max() < 1e-6 * np.abs(public["w"]).max() + 1e-6


def test_results_do_not_depend_on_threads(make, bits):
    plan = make.plan(outer={"name": "adamw", "lr": 0.1}, change_codec={"name": "int8", "block": 33})
    parameters = make.parameters({"a": (1000, 700), "b": (5,)})
    source = np.random.default_rng(1)
    public = {p.name: source.normal(size=p.shape).astype(np.float32) for p in parameters}
    merged = {f"delta/{p.name}": source.normal(size=p.shape).astype(np.float32) for p in parameters}
    found = []
    for threads in (1, 3):
        change = empty_like(wire.change_schema(plan, parameters))
        after = empty_like(wire.outer_schema(plan, parameters))
        advance_arrays(
            plan, parameters, make.terms(plan, 0).outer, merged=merged, public=public,
            outer=fresh_outer(plan, parameters), change_out=change, outer_out=after, threads=threads,
        )  # fmt: skip
        found.append({name: bits(array) for name, array in (change | after).items()})
    assert found[0] == found[1]


def test_what_is_not_trained_is_copied_and_does_not_travel(make):
    plan = make.plan()
    parameters = make.parameters({"w": (3,)})
    parameters += (parameters[0].model_copy(update={"name": "fixed", "trainable": False}),)
    public = {"w": np.ones(3, np.float32), "fixed": np.full(3, 7, np.float32)}
    new, _ = step(plan, parameters, OuterTerms(lr=1.0), {"delta/w": np.ones(3, np.float32)}, public, {})
    assert new["w"].tolist() == [0, 0, 0]
    assert new["fixed"].tolist() == [7, 7, 7]
    assert "delta/fixed" not in wire.change_schema(plan, parameters)
