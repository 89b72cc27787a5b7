from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyhands.engine.flops import training_flops
from manyhands.engine.report import peak_flops
from manyhands.tasks.protocol import Loss


def test_what_is_counted_without_contents_is_what_is_computed(world: Any) -> None:
    task = world.task()
    model = task.build_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    counted = training_flops(task, model)
    with FlopCounterMode(display=False) as counter:
        task.loss(model, task.batch(np.zeros(1, dtype=np.int64))).mean.backward()
    assert counted == counter.get_total_flops()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_a_model_whose_way_depends_on_contents_is_not_counted(world: Any) -> None:
    class Choosy:
        def __init__(self) -> None:
            self.task = world.task()

        def batch(self, indices: np.ndarray) -> Any:
            return self.task.batch(indices)

        def loss(self, model: torch.nn.Module, batch: Any) -> Loss:
            loss = self.task.loss(model, batch)
            return loss if loss.mean.item() > 0 else self.task.loss(model, batch)

    task: Any = Choosy()
    assert training_flops(task, task.task.build_model()) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A4000", None),  # neither an A40
        ("NVIDIA RTX A1000 Laptop GPU", None),  # nor an A10
    ],
)
def test_a_peak_is_that_of_this_very_device(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda")) == peak
