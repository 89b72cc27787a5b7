from __future__ import annotations

from typing import Any

import pytest
import torch

from manyhands.engine.optimizer import build_optimizer, restore_state, state_of
from manyhands.errors import StorageError
from manyhands.plan.schema import InnerOptimizer


def model() -> torch.nn.Module:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    net[0].bias.requires_grad_(False)
    return net


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        optimizer.zero_grad()
        net(torch.randn(8, 4, generator=generator)).square().mean().backward()
        optimizer.step()


SETTINGS = [
    InnerOptimizer(),
    InnerOptimizer(name="sgd", lr=0.1, momentum=0.9),
    InnerOptimizer(name="sgd", lr=0.1, momentum=0.0),
    InnerOptimizer(name="muon", lr=0.01),
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_state_comes_back_bit_for_bit(settings: InnerOptimizer, same: Any) -> None:
    net = model()
    optimizer = build_optimizer(settings, net)
    steps(net, optimizer, 3, seed=5)
    state = state_of(optimizer, net)
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    steps(net, optimizer, 3, seed=6)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert same(state, kept), "a taken state is a copy"

    other = model()
    again = build_optimizer(settings, other)
    steps(other, again, 2, seed=9)  # another past, which must not matter
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(weights[name])
    restore_state(again, other, state)
    steps(other, again, 3, seed=6)
    assert same({name: p.detach() for name, p in other.named_parameters()}, expected)
    assert same(state, kept), "restoring does not hand out the given tensors"


def test_names_of_the_state() -> None:
    net = model()
    optimizer = build_optimizer(InnerOptimizer(), net)
    assert state_of(optimizer, net) == {}
    steps(net, optimizer, 1, seed=5)
    names = set(state_of(optimizer, net))
    assert {"step/0.weight", "exp_avg/0.weight", "exp_avg_sq/2.bias"} <= names
    assert not any(name.endswith("0.bias") for name in names), "frozen parameters have no state"


def test_none_starts_from_scratch() -> None:
    net = model()
    optimizer = build_optimizer(InnerOptimizer(), net)
    steps(net, optimizer, 2, seed=5)
    restore_state(optimizer, net, None)
    assert state_of(optimizer, net) == {}


@pytest.mark.parametrize("name", ["exp_avg/nowhere", "exp_avg/0.bias", "exp_avg", "exp_avg/2.bias"])
def test_a_foreign_state_is_refused(name: str) -> None:
    net = model()
    with pytest.raises(StorageError, match="belongs to another run"):
        restore_state(build_optimizer(InnerOptimizer(), net), net, {name: torch.zeros(7)})


def test_weight_decay_is_decoupled_and_only_on_matrices() -> None:
    net = model()
    for settings in (
        InnerOptimizer(name="sgd", lr=0.1, weight_decay=0.5),
        InnerOptimizer(lr=0.1, weight_decay=0.5),
    ):
        optimizer = build_optimizer(settings, net)
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            group["lr"] = 0.2
        optimizer.step()
        for name, parameter in net.named_parameters():
            factor = 1 - 0.2 * 0.5 if parameter.ndim >= 2 else 1.0
            torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    class Words(torch.nn.Module):
        not_hidden = ("head",)

        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 4)
            self.hidden = torch.nn.Linear(4, 4)
            self.output = torch.nn.Linear(4, 5, bias=False)
            self.parts = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 4)})

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.output

    net = Words()
    settings = InnerOptimizer(name="muon", lr=0.02, weight_decay=0.0)
    optimizer = build_optimizer(settings, net)
    before = net.hidden.weight.detach().clone()
    net.output(net.hidden(net.embedding(torch.arange(5)))).square().sum().backward()
    net.parts["head"](torch.ones(4)).sum().backward()
    optimizer.step()
    keys = {
        name.split("/", 1)[1]: name.split("/", 1)[0]
        for name in state_of(optimizer, net)
        if "step" not in name
    }
    assert keys["hidden.weight"] == "momentum_buffer"
    others = ("embedding.weight", "hidden.bias", "parts.head.weight", "output.weight")
    assert {keys[name] for name in others} == {"exp_avg_sq"}
    # An orthogonalized step of a 4 x 4 matrix, scaled by 0.2 * sqrt(4): all singular values near 0.4 times lr.
    moved = torch.linalg.svdvals((before - net.hidden.weight.detach()) / 0.02)
    assert 0.2 < float(moved.min()) <= float(moved.max()) < 0.6


@pytest.mark.parametrize(("momentum", "used"), [(None, 0.95), (0.0, 0.0), (0.5, 0.5)])
def test_muon_has_the_momentum_that_the_plan_says(momentum: float | None, used: float) -> None:
    net = model()
    optimizer = build_optimizer(InnerOptimizer(name="muon", lr=0.01, momentum=momentum), net)
    assert [group["momentum"] for group in optimizer.param_groups if "momentum" in group] == [used]
    assert InnerOptimizer(name="sgd", momentum=momentum).used_momentum == (momentum or 0.0)
