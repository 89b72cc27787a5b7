from __future__ import annotations

import os

import pytest
import torch

from manyhands.engine.launch import choose_devices
from manyhands.errors import WorkerError


def test_devices_are_indexes_of_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7,2")
    choose_devices([2, 0])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,4"


@pytest.mark.parametrize(("shown", "indexes"), [("0,1", [0, 5]), ("0,1", [-1]), ("0,1", [1, 1]), ("", [0])])
def test_a_device_that_is_not_there_or_twice_is_refused(
    monkeypatch: pytest.MonkeyPatch, shown: str, indexes: list[int]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    with pytest.raises(WorkerError, match=r"there is no device -?\d for a process of its own"):
        choose_devices(indexes)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
