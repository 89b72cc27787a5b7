from __future__ import annotations

import pytest
import torch

from manyhands.engine.device import choose_device, use_threads
from manyhands.engine.settings import EngineSettings
from manyhands.errors import PlanError, WorkerError


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


def test_an_index_is_told_how_it_is_given() -> None:
    with pytest.raises(PlanError) as caught:
        EngineSettings.parse({"exec": {"device": 1}}, where="words")
    assert str(caught.value) == (
        "words: 'exec.device' is 1: expected auto, cpu, cuda or cuda:N; for the GPU of this index give "
        "--device cuda:1, or --devices 1."
    )
    for other in (True, 1.5, -1):
        with pytest.raises(PlanError, match="expected text"):
            EngineSettings.parse({"exec": {"device": other}}, where="words")
