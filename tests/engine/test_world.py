from __future__ import annotations

import pytest
import torch

from manyhands.engine.world import Place, device_of
from manyhands.errors import WorkerError


def test_each_process_of_a_machine_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Place(rank=5, world_size=8, local_rank=1, local_size=2)
    assert device_of(second, "cpu") == torch.device("cpu")
    with pytest.raises(WorkerError, match="cuda:1 is one device, and there are 8 processes"):
        device_of(second, "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(second) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(WorkerError, match="2 processes need a CUDA device each, and 1 are visible"):
        device_of(second)
