from __future__ import annotations

import os
import signal
import socket

import pytest
import torch

from manyhands.engine.launch import Nodes, choose_devices, launch
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


def test_machines_that_do_not_come_and_a_port_that_is_taken_are_told() -> None:
    def started(rank: int, port: int) -> str:
        nodes = Nodes(count=2, rank=rank, address="127.0.0.1", port=port, wait_s=1)
        with pytest.raises(WorkerError) as error:
            launch(["-c", "pass"], 1, restarts=0, again=(), tell=print, among=nodes)
        return str(error.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} at 127.0.0.1 cannot be opened (Address already in use" in started(0, port)
    assert f"machine 1 of 2 found nobody at 127.0.0.1:{port} within 1 s" in started(1, port)
    assert "machine 0 of 2: not all machines came within 1 s" in started(0, port)


@pytest.mark.parametrize(("restarts", "times"), [(0, "once"), (1, "twice"), (2, "3 times")])
def test_how_often_a_training_was_started_before_it_is_given_up(restarts: int, times: str) -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGINT)
    assert launch(["-c", "raise SystemExit(1)"], 1, restarts=restarts, again=(), tell=told.append) == 1
    assert told[-1] == (
        f"rank 0 ended with code 1; it was started {times} and is given up (exec.restarts={restarts})"
    )
    assert signal.getsignal(signal.SIGINT) is before, "who calls it has its own again"
