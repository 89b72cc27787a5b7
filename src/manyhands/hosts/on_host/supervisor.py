"""Beside a training on the host: starts it, keeps what it prints, and writes down how it ended.

Its text is written into the run's directory and runs there by itself, detached: it outlives the connection, and needs
nothing but the standard library of Python 3.8 or later. What is in the run's directory:

    job.json       what to run, in which directory and environment; and what exports its checkpoints
    host.log       everything that they printed
    ended-at-once  empty, where somebody has had it killed
    asked-to-end   empty, where somebody has asked it to save and end
    status.json    the processes, when they began, and at the end the exit code or the signal and the last lines

The export runs beside the training, one at a time, whenever a checkpoint has come, and once more after a training
that ended well or was asked to end. One that failed is told at once: its checkpoints get theirs when it goes on.

Invariants: status.json is replaced whole, also on a full disk (room for it is kept). The training gets SIGTERM when
this process dies, and is ended when its directory is gone, so nobody holds a GPU unseen. Whatever the training
started is ended with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

from manyhands.hosts.on_host.processes import AT_ONCE, begun, boot, killed_by_kernel

LAST_LINES = 30
PR_SET_PDEATHSIG = 1
CHECK_EVERY_S = 1.0
SAVED_AND_ENDED = 130  # the exit code of a training that was asked to end
GONE_AFTER = 3  # checks in a row
ROOM = b" " * 65536


class Supervisor:
    """One run of one job."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        with open(os.path.join(directory, "job.json"), encoding="utf-8") as file:
            self.job: dict[str, Any] = json.load(file)
        self.log = open(os.path.join(directory, "host.log"), "ab", buffering=0)  # noqa: SIM115 - for good
        self.tail = b""
        self.child: subprocess.Popen[bytes] | None = None
        self.exporter: subprocess.Popen[bytes] | None = None
        self.killed: int | None = None  # how many processes the kernel has killed for want of memory
        self.seen = self._checkpoints()
        self.status: dict[str, Any] = {
            "version": 1,
            "state": "running",
            "phase": "training",
            "pid": os.getpid(),
            "pid_start": begun(os.getpid()),
            "boot": boot(),
            "started_ms": time.time_ns() // 1_000_000,
            "rank": self.job.get("rank", 0),
        }

    def carry_out(self) -> None:
        with open(self._path("room"), "wb") as file:
            file.write(ROOM)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._pass_on)
        self.killed = killed_by_kernel()
        code = self._run(self.job["command"])
        ending: dict[str, Any] = (
            {"exit_code": code} if code >= 0 else {"signal": -code, "exit_code": 128 - code}
        )
        killed = killed_by_kernel()
        if code == -signal.SIGKILL and killed is not None and killed != self.killed:
            ending["out_of_memory"] = True
        if code == -signal.SIGKILL and os.path.exists(self._path(AT_ONCE)):
            ending["at_once"] = True
        ending["tail"] = self._last_lines()
        if self.exporter is not None:  # what it has not made is made now, where it can be asked to end
            end_group(self.exporter)
            self.exporter.wait()
        if code in (0, SAVED_AND_ENDED) and self.job.get("export"):
            self.status["phase"] = "exporting"
            self._run(self.job["export"])
        self.status.update(ending, state="ended", phase="ended", ended_ms=time.time_ns() // 1_000_000)
        self._write_status()

    def _run(self, command: list[str]) -> int:
        try:
            self.child = self._started(command, subprocess.PIPE)
        except OSError as error:
            self._keep(f"{command[0]} cannot be started: {error}\n".encode())
            return 127
        self.status.update(child=self.child.pid, child_start=begun(self.child.pid))
        self._write_status()
        assert self.child.stdout is not None
        with self.child.stdout as output:
            self._listen(self.child, output.fileno())
        code = self.child.wait()
        end_group(self.child)  # whatever it left behind
        return code

    def _started(self, command: list[str], output: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            cwd=os.path.join(self.directory, self.job.get("cwd", ".")),
            env=dict(os.environ, **self.job.get("environment", {})),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )

    def _listen(self, child: subprocess.Popen[bytes], output: int) -> None:
        """Until it closes its output, or has ended while something that it started holds it open."""
        looked, missed = time.monotonic(), 0
        while True:
            if select.select([output], [], [], CHECK_EVERY_S)[0]:
                text = os.read(output, 65536)
                if not text:
                    return
                self._keep(text)
            elif child.poll() is not None:
                return
            if time.monotonic() - looked < CHECK_EVERY_S:
                continue
            looked = time.monotonic()
            missed = missed + 1 if self._directory_is_gone() else 0
            if missed == GONE_AFTER:
                end_group(child)
            if self.status["phase"] == "training":
                self._export_new()

    def _directory_is_gone(self) -> bool:
        """Nobody could find what goes on in it, nor end it; a file system that only does not answer is not gone."""
        try:
            os.stat(self.directory)
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False

    def _export_new(self) -> None:
        """Start the export where a checkpoint has come; tell in the status when it has ended."""
        if self.exporter is not None:
            if self.exporter.poll() is None:
                return
            if self.exporter.returncode == -signal.SIGKILL:  # not a sign of what ends the training
                self.killed = killed_by_kernel()
            self.exporter = None
            self.status["exports"] = self.status.get("exports", 0) + 1
            self._write_status()
        seen, self.seen = self.seen, self._checkpoints()
        if self.job.get("export") and not self.seen <= seen:
            with contextlib.suppress(OSError):
                self.exporter = self._started(self.job["export"], self.log)

    def _checkpoints(self) -> set[str]:
        try:
            return {name for name in os.listdir(self._path("checkpoints")) if name.startswith("step-")}
        except OSError:
            return set()

    def _keep(self, text: bytes) -> None:
        self.tail = (self.tail + text)[-16384:]
        with contextlib.suppress(OSError):  # a full disk: the last lines are in memory
            self.log.write(text)

    def _last_lines(self) -> list[str]:
        text = self.tail.decode("utf-8", "replace").replace("\r", "\n")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-LAST_LINES:]

    def _write_status(self) -> None:
        """Whole or not at all. The first room that a full disk gives back is that of the file `room`."""
        for attempt in range(2):
            try:
                with open(self._path("status.json.aside"), "w", encoding="utf-8") as file:
                    file.write(json.dumps(self.status))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(self._path("status.json.aside"), self._path("status.json"))
                return
            except OSError:
                if attempt:
                    return
                try:
                    os.remove(self._path("room"))
                except OSError:
                    return

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def _pass_on(self, number: int, _frame: Any) -> None:
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    Supervisor(sys.argv[1]).carry_out()
