"""Trainings of the host: started so that they outlive the connection, followed, asked about and ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from manyhands.hosts.on_host.facts import free_bytes
from manyhands.hosts.on_host.frames import Line, absolute
from manyhands.hosts.on_host.processes import ASKED, AT_ONCE, begun, boot

LOOK_EVERY_S = 0.4
BEAT_EVERY_S = 2.0
SILENCE_S = 60.0
"""A follower that says nothing for so long is gone, whatever the connection says."""
BEGIN_S = 20.0
UNREADABLE_S = 10.0
"""So long without the status of a training that has begun, and nobody will know any more."""
PIECE = 256 * 1024


def start(line: Line, request: dict[str, Any]) -> None:
    """Write the supervisor and its job into the run's directory, and start it."""
    directory = absolute(request["run"])
    found = status_of(directory)
    if found is not None and found["state"] == "running":
        line.answer(error=f"a training runs in {directory} already", kind="running")
        return
    os.makedirs(directory, exist_ok=True)
    with contextlib.suppress(OSError):  # of a mount that has no modes
        os.chmod(directory, 0o700)
    for name in ("status.json", "job.json", AT_ONCE, ASKED):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(directory, name))
    job = {**request["job"], "python": sys.executable}
    for name, content in (("supervisor.py", request["supervisor"]), ("job.json", json.dumps(job))):
        with open(os.path.join(directory, name), "w", encoding="utf-8", opener=private) as file:
            file.write(content)
    with open(os.path.join(directory, "supervisor.log"), "wb") as said:
        supervisor = subprocess.Popen(
            [sys.executable, "-I", os.path.join(directory, "supervisor.py"), directory],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    end = time.monotonic() + BEGIN_S
    while time.monotonic() < end and supervisor.poll() is None:
        if os.path.exists(os.path.join(directory, "status.json")):
            line.answer(status=status_of(directory))
            return
        time.sleep(0.02)
    found = status_of(directory)  # it may have ended already
    if found is not None:
        line.answer(status=found)
        return
    with open(os.path.join(directory, "supervisor.log"), "rb") as said:
        words = said.read().decode("utf-8", "replace")[-1000:].strip()
    line.answer(error=f"the supervisor did not begin: {words}", kind="supervisor")


def private(path: str, flags: int) -> int:
    """For a file that nobody else reads: the environment of a job may hold secrets."""
    return os.open(path, flags, 0o600)


def follow(line: Line, request: dict[str, Any]) -> None:
    """New bytes of some files, and every change of the status, until the training has ended and all is told.

    Ends before that when the other side goes, or says nothing for SILENCE_S.
    """
    directory, offsets = absolute(request["run"]), dict(request["offsets"])
    told: Any = 0
    beat = heard = known = time.monotonic()
    while True:
        found = status_of(directory)  # before the files: what was written before the end is there
        sent = new_bytes(line, directory, offsets)
        if found != told:
            line.answer(more=True, status=found)
            told, sent = found, True
        if found is None and not os.path.isdir(directory):
            line.answer(status={"state": "gone"}, free=None)
            return
        known = time.monotonic() if found is not None else known
        if time.monotonic() - known > (UNREADABLE_S if was_begun(directory) else BEGIN_S):
            lost = {"state": "lost", "unreadable": True}
            line.answer(status=lost if was_begun(directory) else {"state": "never started"}, free=None)
            return
        if found is not None and found["state"] != "running":
            line.answer(status=found, free=free_bytes(directory))
            return
        now = time.monotonic()
        if sent:
            beat = now
        elif now - beat >= BEAT_EVERY_S:
            line.answer(more=True, beat=True)
            beat = now
        line.flush()
        if select.select([0], [], [], LOOK_EVERY_S)[0]:
            if not os.read(0, 4096):
                return
            heard = now
        elif now - heard > SILENCE_S:
            return


def was_begun(directory: str) -> bool:
    """Whether a supervisor has opened its log there."""
    return os.path.exists(os.path.join(directory, "host.log"))


def new_bytes(line: Line, directory: str, offsets: dict[str, int]) -> bool:
    """Send what has come to each file since its offset, and move the offsets on."""
    sent = False
    for name in offsets:
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            if os.stat(path).st_size <= offsets[name]:
                continue
            with open(path, "rb") as file:
                file.seek(offsets[name])
                body = file.read(PIECE)
                while body:
                    line.answer(body, more=True, file=name, offset=offsets[name])
                    offsets[name] += len(body)
                    sent = True
                    body = file.read(PIECE)
    return sent


def stop(line: Line, request: dict[str, Any]) -> None:
    """Ask a training to save and end, once; `now`: end it, and all that it started. The export after it ends by
    itself.
    """
    directory = absolute(request["run"])
    found = status_of(directory)
    if found is None:
        line.answer(error=f"no training was started in {request['run']}", kind="none")
        return
    child = found.get("child")
    if child is not None and begun(child) == found["child_start"]:
        with contextlib.suppress(ProcessLookupError):
            if request["now"]:
                mark(os.path.join(directory, AT_ONCE))
                os.killpg(child, signal.SIGKILL)
            elif found.get("phase") == "training":
                if not os.path.exists(os.path.join(directory, ASKED)):
                    mark(os.path.join(directory, ASKED))
                    os.kill(child, signal.SIGTERM)
                os.killpg(child, signal.SIGCONT)  # one that stands still (SIGSTOP) would never hear it
    line.answer(status=found)


def mark(path: str) -> None:
    """A file that is there or not; a full disk has no place for one."""
    with contextlib.suppress(OSError), open(path, "wb"):
        pass


def leave(line: Line, request: dict[str, Any]) -> None:
    """Go on from checkpoint `number` of a training: what is behind it is of a course that is left."""
    line.answer(left=leave_newer(absolute(request["run"]), request["number"]))


def leave_newer(directory: str, number: int) -> list[str]:
    """Move newer checkpoints into checkpoints/aside, as the engine does, and remove their graphs.

    Which they are. Raises OSError.
    """
    checkpoints, exports = (os.path.join(directory, name) for name in ("checkpoints", "exports"))
    left = sorted(newer(checkpoints, number))
    for name in left:
        place = os.path.join(checkpoints, "aside", name)
        shutil.rmtree(place, ignore_errors=True)
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.rename(os.path.join(checkpoints, name), place)
    for name in newer(exports, number):
        os.remove(os.path.join(exports, name))
    return left


def newer(folder: str, number: int) -> list[str]:
    return [name for name in os.listdir(folder) if step_of(name) > number] if os.path.isdir(folder) else []


def step_of(name: str) -> int:
    """Of step-00000020 and step-00000020.onnx; -1 for what is called otherwise."""
    match = re.match(r"step-(\d{8,})(\.onnx.*)?$", name)
    return int(match.group(1)) if match else -1


def status(line: Line, request: dict[str, Any]) -> None:
    line.answer(status=status_of(absolute(request["run"])))


def status_of(directory: str) -> dict[str, Any] | None:
    """What the supervisor wrote last; `lost` where it is no more and has not said how the training ended. None where
    there is nothing, or what no supervisor wrote.
    """
    try:
        with open(os.path.join(directory, "status.json"), encoding="utf-8") as file:
            found: dict[str, Any] = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or not found.keys() >= {"state", "boot", "pid", "pid_start"}:
        return None
    restarted = found["boot"] != boot()
    if found["state"] == "running" and (restarted or begun(found["pid"]) != found["pid_start"]):
        found.update(state="lost", restarted=restarted)
    return found
