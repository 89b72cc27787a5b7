"""A node's handle on a worker: its death, at whatever moment, fails every call once and for all."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from manyhands.errors import WorkerError
from manyhands.node.worker_process import WorkerProcess

WORKER = "manyhands.node.workers.dummy_worker"
BOUND_S = 20.0


@pytest.mark.parametrize("after_s", [0.0, 0.0005, 0.001, 0.002, 0.004, 0.01, 0.1])
def test_calls_end_with_the_worker(tmp_path: Path, after_s: float) -> None:
    """Also when it dies before it has begun to listen, and when the node notices late."""

    async def killed() -> str:
        worker = await WorkerProcess.start(WORKER, log=tmp_path / "worker.log")
        calls = [asyncio.create_task(worker.call("load", path="x" * 100_000)) for _ in range(3)]
        await asyncio.sleep(after_s)
        os.kill(worker.pid, signal.SIGKILL)
        async with asyncio.timeout(BOUND_S):
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, WorkerError) for result in results), results
        assert not worker.alive
        with pytest.raises(WorkerError, match="signal 9"):
            await worker.call("load")
        worker.abandon("0-0")  # to the dead: nothing happens
        await worker.stop()
        return worker.last_words()

    assert "was killed by signal 9" in asyncio.run(killed())


def test_an_operation_that_fails_leaves_the_worker_alive(tmp_path: Path) -> None:
    async def failed() -> None:
        worker = await WorkerProcess.start(WORKER, log=tmp_path / "worker.log")
        for _ in range(2):
            with pytest.raises(WorkerError, match="nonsense"):
                await worker.call("nonsense")
        assert worker.alive
        await worker.stop()
        assert not worker.alive

    asyncio.run(failed())


def test_a_worker_that_stands_still_is_ended_too(tmp_path: Path) -> None:
    async def stopped() -> None:
        worker = await WorkerProcess.start(WORKER, log=tmp_path / "worker.log")
        with pytest.raises(WorkerError):
            await worker.call("nonsense")  # it listens
        os.kill(worker.pid, signal.SIGSTOP)
        while psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)
        async with asyncio.timeout(BOUND_S):
            await worker.stop(grace_s=0.2)
        assert "signal 9" in worker.last_words()

    asyncio.run(stopped())


def test_a_worker_that_hangs_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At work it answers all the same; stopped it does not, and its calls fail as at any death."""

    async def hung() -> str:
        worker = await WorkerProcess.start(WORKER, log=tmp_path / "worker.log", silence_s=1.0)
        with pytest.raises(WorkerError):
            await worker.call("nonsense")  # it listens
        await asyncio.sleep(2.0)
        assert worker.alive, "one that has nothing to do still answers"
        os.kill(worker.pid, signal.SIGSTOP)
        async with asyncio.timeout(BOUND_S):
            with pytest.raises(WorkerError, match="signal 9 since it had not answered for 1 s"):
                await worker.call("load")
        assert not worker.alive
        await worker.stop()
        return str(worker.pid)

    assert asyncio.run(hung()) in caplog.text


def test_a_worker_at_work_answers(tmp_path: Path) -> None:
    busy = "import sys, time; from manyhands.node.workers.channel import open_channel; "
    (tmp_path / "busy_worker.py").write_text(
        busy + "open_channel().serve({'sleep': lambda seconds: time.sleep(seconds)})"
    )

    async def at_work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path))
            worker = await WorkerProcess.start("busy_worker", log=tmp_path / "log", silence_s=1.0)
        assert await worker.call("sleep", seconds=3.0) is None
        await worker.stop()

    asyncio.run(at_work())


@pytest.mark.parametrize("last_words", [b"", b'{"op": "load", "id": 1, "argu', b"no request\n"])
def test_a_worker_ends_with_its_node_however_that_went(tmp_path: Path, last_words: bytes) -> None:
    """With an answer that nobody has read the worker sees a reset of the connection, not its end."""
    ours, theirs = socket.socketpair()
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdout=log,
            stderr=log,
        )
    theirs.close()
    try:
        ours.sendall(b'{"op": "nonsense", "id": 1, "arguments": {}}\n')
        assert b"started" in ours.recv(1000, socket.MSG_PEEK)  # left unread
        ours.sendall(last_words)
        ours.close()
        assert worker.wait(BOUND_S) == 0
    finally:
        worker.kill()
        worker.wait()
