from __future__ import annotations

import json
import os
import sys
import types
from typing import Any

import psutil
import pytest

from manyhands.ui.main import run

GIB = 1 << 30


class FakeNvml(types.ModuleType):
    """Two GPUs; on the first this process and one that has gone, on the second this process with graphics."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self, fault: str | None = None) -> None:
        super().__init__("pynvml")
        self.fault, self.closed = fault, False

    def nvmlInit(self) -> None:
        if self.fault is not None:
            raise self.NVMLError(self.fault)

    def nvmlShutdown(self) -> None:
        self.closed = True

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes | str:
        return b"NVIDIA H200" if handle == 0 else "NVIDIA T4"

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(total=(140 if handle == 0 else 16) * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        mine = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * GIB)
        gone = types.SimpleNamespace(pid=2**22 + 7, usedGpuMemory=None)
        return [gone, mine] if handle == 0 else []

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: int) -> list[Any]:
        if handle == 0:
            raise self.NVMLError_NotSupported()
        return [types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB)]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


ME = psutil.Process()


def test_one_line_per_process(nvml: FakeNvml, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gpus"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    mine = [ME.username(), str(ME.pid), ME.name()]
    assert lines == [
        [*mine, "3.0 GiB", "0", "NVIDIA H200", "140.0 GiB", "GPU-0"],
        ["?", str(2**22 + 7), "?", "?", "0", "NVIDIA H200", "140.0 GiB", "GPU-0"],
        [*mine, "1.0 GiB", "1", "NVIDIA T4", "16.0 GiB", "GPU-1"],
    ]
    assert nvml.closed


@pytest.mark.usefixtures("nvml")
def test_those_of_one_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["gpus", "--user", ME.username(), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["index"], row["used_bytes"]) for row in rows] == [(0, 3 * GIB), (1, GIB)]
    assert run(["gpus", "--user", "nobody-of-that-name"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("nvml")
def test_a_table_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    assert run(["gpus", "--format", "table"]) == 0
    shown = capsys.readouterr().out
    assert "3 processes on 2 GPUs" in shown
    assert "total memory" in shown
    assert "GPU-1" in shown


@pytest.mark.parametrize(("form", "shown"), [("lines", "GPU-1\n"), ("table", "3 processes on 2 GPUs")])
def test_watching_ends_with_ctrl_c(
    nvml: FakeNvml, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, form: str, shown: str
) -> None:
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", sleep)
    assert run(["gpus", "--watch", "0.5", "--format", form]) == 130
    assert waits == [0.5, 0.5]
    assert shown in capsys.readouterr().out
    assert nvml.closed


def test_without_a_driver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("NVML Shared Library Not Found"))
    assert run(["gpus"]) == 12
    assert "no NVIDIA GPU can be asked here (NVML Shared Library Not Found)" in capsys.readouterr().err
