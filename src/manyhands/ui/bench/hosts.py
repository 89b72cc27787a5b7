"""Measurements of training on another host: an sshd on loopback, started for the measurement, is that host.

Client and host share this machine, so both sides' work is in each figure. Without an sshd a row says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import pty
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import psutil

from manyhands.errors import WorkerError
from manyhands.ui.bench.harness import Measured
from manyhands.ui.bench.loopback_host import LoopbackHost, loopback_host, sshd_program

TINY: Final = (
    "task=tabular", "task.table.generated_rows=500", "local.steps=20", "local.batch_size=16", "run=bench",
    "rounds.snapshot_every=1", "rounds.total=100000", "evaluation.max_batches=2", "logging.every_steps=1",
    "exec.threads=1",
)  # fmt: skip
USUAL: Final = (
    "task.text.max_bytes=500000", "local.steps=1000", "rounds.total=1000", "rounds.snapshot_every=1",
    "evaluation.max_batches=4", "exec.threads=1", "run=bench",
)  # fmt: skip
"""A training as people follow one: the default model, an event for each ten steps, a checkpoint now and then."""
FOLLOWED_S: Final = 180.0
FETCHED_BYTES: Final = 256 << 20


def _on_a_host(measure: Callable[[LoopbackHost], Measured]) -> Callable[[], Measured]:
    """With a host of its own, in this process's environment as well."""

    @functools.wraps(measure)
    def measured() -> Measured:
        if sshd_program() is None:
            return Measured(value=None, note="there is no sshd on this machine: install openssh-server")
        with (
            tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name,
            loopback_host(Path(name)) as host,
        ):
            os.environ.update(host.environment())
            return measure(host)

    return measured


@_on_a_host
def host_start(_host: LoopbackHost) -> Measured:
    """From the command to the first step's line; the command's own process included."""
    with _training() as (process, begun):
        times: dict[str, float] = {}
        for kind, at in _kinds(process, begun):
            times.setdefault(kind, at)
            if kind == "step":
                break
    return Measured(
        value=round(times["step"], 2),
        note=f"connected {times['host']:.1f} s, torch there {times['preparing']:.1f} s; load {_load()}",
    )


@_on_a_host
def host_death(host: LoopbackHost) -> Measured:
    """From the training's kill -9 to the end of the command here, which shows the last lines."""
    with _training() as (process, begun):
        next(at for kind, at in _kinds(process, begun) if kind == "step")
        remote = host.home / "manyhands" / "runs" / "bench"
        os.kill(json.loads((remote / "status.json").read_text())["child"], signal.SIGKILL)
        killed = time.perf_counter()
        output, said = process.communicate(timeout=60)
        took = time.perf_counter() - killed
    shown = "killed by SIGKILL" in said and "step " in said.rpartition("Its last lines:")[2]
    if process.returncode != 137 or not shown:
        raise WorkerError(
            f"the kill was not shown: exit code {process.returncode}, {said[-500:]}{output[-200:]}"
        )
    return Measured(value=round(took, 2), note=f"exit code 137, the last lines are shown; load {_load()}")


@_on_a_host
def host_follow(host: LoopbackHost) -> Measured:
    """CPU seconds of all processes, on both sides, that follow a training in a terminal for 180 s."""
    with _training(*USUAL) as (process, begun):
        next(at for kind, at in _kinds(process, begun) if kind == "step")
        process.kill()  # the training goes on
        process.wait()
        remote = host.home / "manyhands" / "runs" / "bench"
        supervisor = json.loads((remote / "status.json").read_text())["pid"]
        before, lines = _cpu(host, None, supervisor), _lines(remote)
        with _in_a_terminal([sys.executable, "-m", "manyhands", "hosts", "attach", "bench"]) as attached:
            time.sleep(FOLLOWED_S)
            here, there, watching = _cpu(host, attached.pid, supervisor)
            if attached.poll() is not None:
                raise WorkerError(f"the follower ended early, with {attached.returncode}")
        followed = _lines(host.manyhands_home / "runs" / "bench") - lines
    there, watching = there - before[1], watching - before[2]
    return Measured(
        value=round(here + there + watching, 2),
        note=f"{here:.2f} s here (beginning included), {there:.2f} s of agent and sshd there, {watching:.2f} s of "
        f"the supervisor; {followed} events came; load {_load()}",
    )


@_on_a_host
def fetch_rate(host: LoopbackHost) -> Measured:
    """A checkpoint of 256 MiB, hashed on both sides; beside it, the same file by scp; and once with a cut."""
    from manyhands.hosts.fetch import fetch
    from manyhands.hosts.hosts_file import host_named

    remote = host.home / "run"
    file = remote / "checkpoints" / "step-00000001" / "model.safetensors"
    file.parent.mkdir(parents=True)
    block = secrets.token_bytes(1 << 20)
    with file.open("wb") as opened:
        for _ in range(FETCHED_BYTES >> 20):
            opened.write(block)
    server = host_named("server1")
    rates = []
    for number in range(4):
        done = asyncio.run(fetch(server, str(remote), host.client / f"whole-{number}"))
        rates.append(done.bytes / done.seconds / 2**20)
    cut = asyncio.run(_cut_and_go_on(host, remote))
    floor = _scp_rate(host, file)
    return Measured(
        value=round(statistics.median(rates[1:]), 1),
        floor=round(floor, 1),
        note=f"median of three after one: {', '.join(f'{rate:.0f}' for rate in rates)}; floor is scp; cut at a half, "
        f"{cut}; load {_load()}",
    )


# ---------------------------------------------------------------------------------------- what they are made of
@contextlib.contextmanager
def _in_a_terminal(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Of 120 columns, whose reader takes and forgets what is drawn."""
    main, other = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
    )
    os.close(other)

    def read() -> None:
        with contextlib.suppress(OSError):  # the other side is closed
            while os.read(main, 65536):
                pass

    reading = threading.Thread(target=read, daemon=True)
    reading.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        reading.join()
        os.close(main)


def _lines(run: Path) -> int:
    return (run / "events.jsonl").read_bytes().count(b"\n")


@contextlib.contextmanager
def _training(*words: str) -> Iterator[tuple[subprocess.Popen[str], float]]:
    """`manyhands train --host`, whose events come as JSON; ended there as well."""
    begun = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "manyhands",
        "train",
        "--host",
        "server1",
        "--logs",
        "json",
        "--no-export",
        *(words or TINY),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process, begun
    finally:
        process.kill()
        process.communicate()
        stop = [sys.executable, "-m", "manyhands", "hosts", "stop", "bench", "--now"]
        subprocess.run(stop, capture_output=True, check=False)


def _kinds(process: subprocess.Popen[str], begun: float) -> Iterator[tuple[str, float]]:
    """Each event's kind, and when it was shown."""
    assert process.stdout is not None
    for line in process.stdout:
        yield str(json.loads(line)["kind"]), time.perf_counter() - begun
    raise WorkerError(
        f"the training ended with {process.wait()}: {process.stderr.read() if process.stderr else ''}"
    )


def _cpu(host: LoopbackHost, here: int | None, supervisor: int) -> tuple[float, float, float]:
    """CPU seconds so far: of the follower here, of sshd's processes for it with the agent, of the supervisor."""
    there = [p for p in psutil.process_iter() if _below(p, host.sshd_pid)]
    own = 0.0 if here is None else _seconds(psutil.Process(here))
    return own, sum(map(_seconds, there)), _seconds(psutil.Process(supervisor))


def _below(process: psutil.Process, ancestor: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(parent.pid == ancestor for parent in process.parents())
    return False


def _seconds(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        times = process.cpu_times()
        return float(times.user + times.system)
    return 0.0


async def _cut_and_go_on(host: LoopbackHost, remote: Path) -> str:
    """How much came again after the connection was cut in the middle."""
    from manyhands.hosts.fetch import fetch
    from manyhands.hosts.hosts_file import host_named

    here = host.client / "cut"
    aside = here / "checkpoints" / ".step-00000001.fetched" / "model.safetensors"
    bringing = asyncio.create_task(fetch(host_named("server1"), str(remote), here))
    while not (aside.is_file() and aside.stat().st_size >= FETCHED_BYTES // 2):
        if bringing.done():
            raise WorkerError("the transfer was over before it could be cut")
        await asyncio.sleep(0.005)
    await asyncio.to_thread(host.cut)
    done = await bringing
    again = done.bytes - FETCHED_BYTES
    if done.kept_bytes < FETCHED_BYTES // 4:
        raise WorkerError(f"only {done.kept_bytes} bytes were kept after the cut")
    return f"{done.kept_bytes >> 20} MiB were kept and {again >> 20} MiB came again"


def _scp_rate(host: LoopbackHost, file: Path) -> float:
    ssh = host.client / ".ssh" / "config"
    command = ["scp", "-q", "-F", str(ssh), f"server1:{file}", str(host.client / "by-scp")]
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return FETCHED_BYTES / 2**20 / (time.perf_counter() - begun)


def _load() -> str:
    return f"{os.getloadavg()[0]:.1f}"
