"""A tiny GPT on bytes of Python's own source, and plans for it: small enough that a whole run takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from manyhands.plan.choices import overlay
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan

MakePlan = Callable[..., Plan]

TINY: dict[str, Any] = {
    "task": {
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 64},
        "block_size": 32,
        "tokenizer": {"kind": "byte"},
        "text": {"max_bytes": 200_000},
    },
    "local": {"steps": 10, "batch_size": 8},
    "rounds": {"total": 5, "snapshot_every": 2},
    "evaluation": {"max_batches": 8},
}

# The presets' own values, except what depends on the model's size and on how few rounds there are here.
FOR_THIS_SIZE: dict[str, dict[str, Any]] = {
    "fedsgd": {"local": {"steps": 2}, "outer": {"lr": 5e-3}, "rounds": {"total": 14}},
    "fedavg": {"local": {"optimizer": {"lr": 0.3}}},
    "fedprox": {"local": {"optimizer": {"lr": 0.3}}},
    "scaffold": {"local": {"optimizer": {"lr": 0.3}}},
    "fedadam": {"local": {"optimizer": {"lr": 0.1}}},
    "diloco": {"local": {"optimizer": {"lr": 5e-3}}, "outer": {"momentum": 0.5}},
}


@pytest.fixture(scope="session")
def make_plan() -> MakePlan:
    """make_plan(preset, {"rounds": {"total": 2}, ...}): the tiny plan, the preset's values for it, and more."""

    def make(preset: str, *more: dict[str, Any]) -> Plan:
        data: dict[str, Any] = {**TINY, "preset": preset}
        for values in (FOR_THIS_SIZE[preset], *more):
            data = overlay(data, values)
        return resolve(data)

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
