"""Measurements between processes: blobs over HTTP, and rounds of clients that train nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from manyhands.errors import WorkerError
from manyhands.node.event_loop import run
from manyhands.ui.bench.harness import Measured
from manyhands.ui.processes import Programs, free_port

BLOB_BYTES = 512 * 2**20
BLOBS = 4
STORE = "store"
ROUNDS = 10
SKIPPED_ROUNDS = 3
"""The first rounds warm up caches and files; they are not counted."""


# ---------------------------------------------------------------------------------------- blobs
def blob_up() -> Measured:
    up, _ = run(_blob_there_and_back())
    return up


def blob_down() -> Measured:
    _, down = run(_blob_there_and_back())
    return down


async def _blob_there_and_back() -> tuple[Measured, Measured]:
    import aiohttp

    from manyhands.network.blobs.holders import Holder
    from manyhands.network.blobs.store import BlobStore
    from manyhands.network.blobs.transfer import download, upload

    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name, _blob_server(Path(name)) as url:
        directory = Path(name)
        holder = Holder(url=url)
        ups, downs = [], []
        async with aiohttp.ClientSession() as session:
            store, ref = BlobStore(directory / STORE), None
            for number in range(1 + BLOBS):
                if ref is not None:  # a server deletes what it no longer keeps: the next finds its memory
                    store.delete(ref.blob)
                file = directory / f"blob-{number}"
                _random_file(file, BLOB_BYTES)
                start = time.perf_counter()
                ref = await upload(session, holder, file)
                ups.append(time.perf_counter() - start)
                file.unlink()
            assert ref is not None
            for _ in range(1 + BLOBS):
                start = time.perf_counter()
                await download(session, [holder], ref, directory / "back", durable=False)
                downs.append(time.perf_counter() - start)
                (directory / "back").unlink()
        disk = BLOB_BYTES / _fsync_seconds(directory, BLOB_BYTES) / 2**20
        loopback = BLOB_BYTES / _loopback_seconds(BLOB_BYTES) / 2**20
    mebibytes = BLOB_BYTES / 2**20
    return (
        Measured(
            value=mebibytes / statistics.median(ups[1:]),
            floor=disk,
            note=f"median of {BLOBS} after one; hashing and the server's fsync in it; floor: write and fsync",
        ),
        Measured(
            value=mebibytes / statistics.median(downs[1:]),
            floor=loopback,
            note=f"median of {BLOBS} after one; verification and writing in it, no fsync; floor: a bare socket",
        ),
    )


@contextlib.contextmanager
def _blob_server(directory: Path) -> Iterator[str]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "manyhands.ui.bench.blob_server", str(port), str(directory / STORE)]
    )
    try:
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise WorkerError("the blob server did not start")
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _random_file(path: Path, size: int) -> None:
    """On the disk on return: what is still being written would compete with what is measured."""
    with path.open("wb") as file:
        for _ in range(size // 2**20):
            file.write(os.urandom(2**20))
        file.flush()
        os.fsync(file.fileno())


def _fsync_seconds(directory: Path, size: int) -> float:
    """The time to write so many bytes to a new file and have them on the disk."""
    piece = os.urandom(2**20)
    path = directory / "floor"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        with path.open("wb") as file:
            for at in range(0, size, len(piece)):
                file.write(piece[: min(len(piece), size - at)])
            file.flush()
            os.fsync(file.fileno())
        times.append(time.perf_counter() - start)
        path.unlink()
    return statistics.median(times)


def _loopback_seconds(size: int) -> float:
    """The time in which so many bytes cross a bare TCP connection between two processes of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        code = (
            "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); b = bytes(1 << 20)\n"
            "for _ in range(int(sys.argv[2]) >> 20): s.sendall(b)"
        )
        sender = subprocess.Popen([sys.executable, "-c", code, str(port), str(size)])
        connection, _ = listening.accept()
        buffer = bytearray(2**20)
        received = 0
        start = time.perf_counter()
        with connection:
            while received < size and (count := connection.recv_into(buffer)):
                received += count
        seconds = time.perf_counter() - start
        sender.wait()
    return seconds


# --------------------------------------------------------------------------------------- rounds
def round_overhead_10mb() -> Measured:
    return _round_overhead(2_500_000)


def round_overhead_128mb() -> Measured:
    return _round_overhead(32_000_000)


def _round_overhead(parameters: int) -> Measured:
    """Median time from a round's opening to the next one's: server and two clients as programs, task dummy.

    So all of a round is in it: work, uploads, merging, and that every client fetches and applies the change.
    """
    from manyhands.config import HOME_VARIABLE

    port, run_id = free_port(), f"bench-{secrets.token_hex(3)}"
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        directory = Path(name)
        with Programs(directory / "logs") as programs:
            arguments = ["server", "run", "--plan", "dummy", "--port", str(port), "--run-id", run_id]
            arguments += [f"task.parameters={parameters}", f"rounds.total={ROUNDS + 1}", "local.steps=1"]
            arguments += ["membership.min_clients=2"]
            programs.start("server", arguments, {HOME_VARIABLE: str(directory / "server")})
            _until_answers(address, run_id, programs)
            for client in ("one", "two"):
                joining = ["client", "train", "--run-id", run_id, "--server-addr", address, "--logs", "none"]
                programs.start(client, joining, {HOME_VARIABLE: str(directory / client)})
            durations = _durations(address, run_id, programs)
        floor = _fsync_seconds(directory, 3 * 4 * parameters)
    return Measured(
        value=statistics.median(durations[SKIPPED_ROUNDS:]) / 1000,
        floor=floor,
        note=f"median of rounds {SKIPPED_ROUNDS} to {ROUNDS - 1}, each from its opening to the next one's, so with "
        "fetching and applying the change; lasting worker processes; floor: write and fsync of two updates and the "
        "new model. Flower 1.41 on such a machine starts a client process for each round and "
        "takes 7.2 s at 10 MB and 11 to 12 s at 128 MB",
    )


def _until_answers(address: str, run_id: str, programs: Programs) -> None:
    from manyhands.errors import ServerUnreachable
    from manyhands.node import operator

    end = time.monotonic() + 120
    while True:
        programs.check()
        try:
            operator.status(address, run_id)
            return
        except ServerUnreachable:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _durations(address: str, run_id: str, programs: Programs) -> list[int]:
    """From each round's opening to the next one's in milliseconds, when the run is finished; the last has none."""
    from manyhands.node import operator
    from manyhands.node.view import RunView

    end = time.monotonic() + 600
    while time.monotonic() < end:
        programs.check()
        view = operator.status(address, run_id)
        assert isinstance(view, RunView)
        if view.phase == "finished":
            if any(len(r.counted) != 2 for r in view.rounds):
                raise WorkerError("a round closed without both clients: its time says nothing")
            return opening_intervals(operator.ledger(address, run_id))
        if view.phase in ("failed", "paused"):
            raise WorkerError(f"the run is {view.phase}: {view.reason}")
        time.sleep(0.25)
    raise WorkerError("the run did not finish within 600 s")


def opening_intervals(rounds: Sequence[Mapping[str, Any]]) -> list[int]:
    """From a ledger's rounds, oldest first."""
    opened = [int(row["opened_ms"]) for row in rounds]
    return [later - earlier for earlier, later in pairwise(opened)]
