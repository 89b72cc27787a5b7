"""Programs that a command starts beside itself, none of which outlives it.

Each is its own process group, so that its workers end with it; each dies with its parent (Linux), so that even a
killed parent leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from manyhands.errors import WorkerError

_PR_SET_PDEATHSIG = 1
GRACE_S = 8.0


class Programs:
    """Started programs by name. Leaving the block ends all of them: SIGTERM, then SIGKILL after GRACE_S, or at once
    when a KeyboardInterrupt comes meanwhile."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._all: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end_all()

    def start(self, name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        """Start `manyhands ARGUMENTS`; its output is appended to <logs>/<name>.log. Returns the pid."""
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "manyhands", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        self._running[name] = process
        self._all.append(process)
        return process.pid

    def log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def kill(self, name: str) -> int:
        """SIGKILL one program, as a crash would, and forget it. Returns the pid that it had."""
        process = self._running.pop(name)
        process.kill()
        process.wait()
        return process.pid

    def check(self) -> None:
        """Forget the programs that ended well; raises WorkerError, with the end of its log, for one that did not."""
        for name, process in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[name]
            if code != 0:
                raise WorkerError(
                    f"{name} ended with exit code {code}. The end of {self.log(name)}:\n{self._tail(name)}"
                )

    def exit_code(self, name: str) -> int | None:
        return self._running[name].poll() if name in self._running else None

    def _tail(self, name: str, lines: int = 12) -> str:
        with contextlib.suppress(OSError):
            text = self.log(name).read_text(encoding="utf-8", errors="replace")
            return "\n".join("  " + line for line in text.splitlines()[-lines:])
        return "  (no log)"

    def end_all(self) -> None:
        try:
            for process in self._all:
                _signal_group(process, signal.SIGTERM)
            end = time.monotonic() + GRACE_S
            for process in self._all:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process in self._all:
                _signal_group(process, signal.SIGKILL)
                process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the program and what it has started. Its group may live on when it does not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at just now, for a program that is about to be started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class MemoryWatch:
    """Samples the resident memory of this process and all below it, summed; `peak_bytes` is the largest sum."""

    def __init__(self, every_s: float = 0.5) -> None:
        self.peak_bytes = 0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while not self._stop.wait(self._every_s):
            total = 0
            for process in [here, *here.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, total)
