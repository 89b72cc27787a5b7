"""Programs that a command starts: none outlives it, and a failed one is named with the end of its log."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from manyhands.errors import WorkerError
from manyhands.ui.processes import MemoryWatch, Programs


def gone(pid: int, within_s: float = 10) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_failed_program_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with Programs(tmp_path / "logs") as programs:
        pid = programs.start("seer", ["no-such-command"], {})
        assert gone(pid)
        with pytest.raises(WorkerError, match=r"seer ended with exit code 2[\s\S]*no-such-command"):
            programs.check()
        programs.check()  # said once


def test_one_that_ends_well_is_forgotten(tmp_path: Path) -> None:
    with Programs(tmp_path) as programs:
        pid = programs.start("version", ["--version"], {})
        assert gone(pid)
        programs.check()
        assert "manyhands" in programs.log("version").read_text()


SERVE = ["server", "run", "--plan", "dummy", "--port", "0"]


@pytest.mark.chaos
def test_leaving_ends_everything(tmp_path: Path) -> None:
    with Programs(tmp_path / "logs") as programs:
        pid = programs.start("server", SERVE, {"MANYHANDS_HOME": str(tmp_path / "home")})
        time.sleep(0.5)
        children = psutil.Process(pid).children(recursive=True)
    assert gone(pid, 1)
    assert all(gone(child.pid, 5) for child in children)


@pytest.mark.chaos
def test_a_killed_parent_leaves_nothing_behind(tmp_path: Path) -> None:
    code = f"""
        import sys, time
        from pathlib import Path
        from manyhands.ui.processes import Programs
        with Programs(Path({str(tmp_path)!r})) as programs:
            print(programs.start("server", {SERVE!r}, {{"MANYHANDS_HOME": {str(tmp_path / "home")!r}}}), flush=True)
            time.sleep(60)
    """
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone(child)


def test_memory_of_everything_below_is_summed() -> None:
    hog = "import time; block = bytearray(120 * 2**20); time.sleep(30)"
    with MemoryWatch(every_s=0.05) as memory:
        child = subprocess.Popen([sys.executable, "-c", hog])
        end = time.monotonic() + 10
        while memory.peak_bytes < 120 * 2**20 + psutil.Process().memory_info().rss and time.monotonic() < end:
            time.sleep(0.05)
        child.kill()
        child.wait()
    assert memory.peak_bytes > 120 * 2**20 + psutil.Process().memory_info().rss * 0.9
