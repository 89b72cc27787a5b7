from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from manyhands.engine.flops import training_flops
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
