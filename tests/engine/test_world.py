from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import FileStore

from manyhands.engine.world import Place, device_of, met
from manyhands.errors import WorkerError

SCRIPT = Path(__file__).with_name("world_ranks.py")


def test_what_ranks_tell_each_other_and_for_whom_they_wait_in_vain(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), str(rank)],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first.pop("missing") == [1]
    assert first.pop("words").startswith("rank 0 waited for rank 1 in vain: look at what that one does")
    assert first.pop("other") == []
    assert first == second
    assert first.pop("differs").startswith("the processes of this training differ in their shoe size")
    assert first == {
        "value": {"x": [0, 0.1, None]},
        "nan": True,
        "facts": [[0], [1, 1, 1, 1]],
        "arrays": [[0], [0, 1]],
        "shared": {"a": ["torch.bfloat16", [[1.0] * 3] * 2], "n": ["torch.int64", 7]},
    }


def test_ranks_started_by_hand_learn_who_is_on_their_machine(tmp_path: Path) -> None:
    """Four on two machines: each has the device that is its own there, and one of each machine prepares the data."""
    machines = ["near", "far", "near", "far"]

    def one(rank: int) -> Place:
        meet = partial(FileStore, str(tmp_path / "meeting"), 4)
        return met(Place(rank=rank, world_size=4, meet=meet, machine=machines[rank]))

    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(one, range(4)))
    assert [(p.rank, p.local_rank, p.local_size) for p in places] == [
        (0, 0, 2),
        (1, 0, 2),
        (2, 1, 2),
        (3, 1, 2),
    ]
    assert met(places[2]) is places[2]


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
