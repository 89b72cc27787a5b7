from __future__ import annotations

import pytest
import torch

from manyhands.engine.device import choose_device, use_threads
from manyhands.errors import WorkerError


def test_devices_by_name() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["cuda:99", "gpu0", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(WorkerError, match=f"'{name}'"):
        choose_device(name)


def test_threads() -> None:
    assert use_threads(2) == 2
    assert use_threads(None) == 2
    assert use_threads(1) == 1
    with pytest.raises(WorkerError, match="at least 1"):
        use_threads(0)
