"""Plans, parameter tables and trainers that are small enough to reason about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.coordination.types import (
    Assignment,
    BlobRef,
    Closing,
    Counted,
    OuterTerms,
    RoundTerms,
    Uncounted,
)
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates.types import Trained

torch.set_num_threads(1)

BASE: dict[str, Any] = {
    "task": {"name": "dummy"},
    "local": {"optimizer": {"name": "sgd", "lr": 0.1, "weight_decay": 0.0, "clip_norm": 0.0}},
}


def merged_dict(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in changes.items():
        result[key] = merged_dict(result[key], value) if isinstance(value, dict) and key in result else value
    return result


def make_plan(**changes: Any) -> Plan:
    data = merged_dict(BASE, changes)
    if data["local"].get("kind") == "gradient":  # which has no use for an optimizer
        del data["local"]["optimizer"]
    return Plan.parse(data)


def make_parameters(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Parameter, ...]:
    return tuple(Parameter(name=name, shape=shape) for name, shape in shapes.items())


def make_assignment(
    round_number: int, client: str, *, ordinal: int = 0, steps: int = 5, weight: int = 1
) -> Assignment:
    return Assignment(
        id=f"{round_number}-{ordinal}",
        round=round_number,
        client=client,
        steps=steps,
        batch_size=4,
        ranges=(),
        weight=weight,
        seed=round_number * 1000 + ordinal,
    )


def make_terms(plan: Plan, round_number: int, t: int | None = None) -> RoundTerms:
    return RoundTerms(
        round=round_number,
        fragment=0,
        first_step=round_number * plan.local.steps,
        learning_rates=(plan.local.optimizer.lr,) * plan.local.steps,
        outer=make_outer_terms(plan, (round_number if t is None else t) + 1),
        deadline_ms=0,
    )


def make_outer_terms(plan: Plan, t: int) -> OuterTerms:
    corrected = plan.outer.name == "adamw" and plan.outer.bias_correction
    return OuterTerms(
        lr=plan.outer.lr,
        bias1=1 - plan.outer.beta1**t if corrected else 1.0,
        bias2=1 - plan.outer.beta2**t if corrected else 1.0,
    )


def make_closing(
    plan: Plan,
    round_number: int,
    counted: Mapping[str, str],
    uncounted: Mapping[str, str] | None = None,
    *,
    weights: Mapping[str, int] | None = None,
    factors: Mapping[str, float] | None = None,
) -> Closing:
    """`counted` and `uncounted`: client by assignment."""
    return Closing(
        round=round_number,
        fragment=0,
        counted=tuple(
            Counted(
                assignment=assignment,
                client=client,
                update=BlobRef(blob="0" * 64, size_bytes=0),
                weight=(weights or {}).get(assignment, 1),
                factor=(factors or {}).get(assignment, 1.0),
            )
            for assignment, client in counted.items()
        ),
        uncounted=tuple(
            Uncounted(assignment=a, client=c, reason="late") for a, c in (uncounted or {}).items()
        ),
        outer=make_outer_terms(plan, round_number + 1),
        closed_ms=0,
    )


class LinearTrainer:
    """Least squares on a client's own data: weights W (in, out) and bias b; SGD or AdamW by the plan."""

    def __init__(self, plan: Plan, seed: int, *, samples: int = 64, shift: float = 0.0) -> None:
        source = np.random.default_rng(seed)
        truth = np.random.default_rng(99).normal(size=(6, 3)) + shift
        self.x = torch.from_numpy(source.normal(size=(samples, 6)).astype(np.float32))
        self.y = torch.from_numpy((self.x.numpy() @ truth + 0.5 + shift).astype(np.float32))
        self.plan = plan
        self.calls: list[SimpleNamespace] = []

    @staticmethod
    def shapes() -> dict[str, tuple[int, ...]]:
        return {"w": (6, 3), "b": (3,)}

    def loss(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return ((self.x @ weights["w"] + weights["b"] - self.y) ** 2).mean()

    def gradient(self, weights: Mapping[str, torch.Tensor], assignment: Assignment) -> Trained:
        leaves = {name: tensor.clone().requires_grad_(True) for name, tensor in weights.items()}
        loss = self.loss(leaves)
        loss.backward()
        return Trained(
            tensors={name: leaf.grad for name, leaf in leaves.items()},
            inner=None,
            loss=float(loss.detach()),
            tokens=0,
            samples=assignment.steps * assignment.batch_size,
            steps=assignment.steps,
        )

    def train(
        self,
        weights: Mapping[str, torch.Tensor],
        inner: Mapping[str, torch.Tensor] | None,
        assignment: Assignment,
        terms: RoundTerms,
        *,
        correction: Mapping[str, torch.Tensor] | None = None,
        proximal: float = 0.0,
    ) -> Trained:
        self.calls.append(SimpleNamespace(inner=inner, correction=correction, proximal=proximal))
        settings = self.plan.local.optimizer
        live = {name: tensor.clone().requires_grad_(True) for name, tensor in weights.items()}
        if settings.name == "adamw":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(live.values(), lr=1.0, weight_decay=0.0)
        else:
            optimizer = torch.optim.SGD(live.values(), lr=1.0)
        if inner is not None and settings.name == "adamw":
            for name, leaf in live.items():
                optimizer.state[leaf] = {
                    key: inner[f"{name}.{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")
                }
        last = 0.0
        for step in range(assignment.steps):
            for group in optimizer.param_groups:
                group["lr"] = terms.learning_rates[step]
            optimizer.zero_grad()
            loss = self.loss(live)
            last = float(loss.detach())
            if proximal:
                loss = loss + proximal / 2 * sum(((live[n] - weights[n]) ** 2).sum() for n in live)
            loss.backward()
            if correction is not None:
                for name, leaf in live.items():
                    leaf.grad.add_(correction[name])
            optimizer.step()
        state = {
            f"{name}.{key}": value.detach().clone()
            for name, leaf in live.items()
            for key, value in optimizer.state.get(leaf, {}).items()
            if isinstance(value, torch.Tensor)
        }
        return Trained(
            tensors={name: leaf.detach() for name, leaf in live.items()},
            inner=state,
            loss=last,
            tokens=0,
            samples=assignment.steps * assignment.batch_size,
            steps=assignment.steps,
        )


@pytest.fixture(scope="session")
def vectors() -> Callable[[str], list[dict[str, Any]]]:
    """Conformance cases by name."""
    return lambda name: json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text())


@pytest.fixture(scope="session")
def unhex() -> Callable[[str], np.ndarray]:
    """fp32 from eight hex digits a value."""
    return lambda text: np.frombuffer(bytes.fromhex(text), dtype=">u4").astype(np.uint32).view(np.float32)


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """plan, parameters, assignment, terms, closing and Trainer by name."""
    return SimpleNamespace(
        plan=make_plan,
        parameters=make_parameters,
        assignment=make_assignment,
        terms=make_terms,
        closing=make_closing,
        Trainer=LinearTrainer,
    )


@pytest.fixture(scope="session")
def bits() -> Callable[[Any], bytes]:
    """The bytes of a tensor or array, so that zeros of either sign differ."""
    return lambda tensor: np.ascontiguousarray(tensor).tobytes()
