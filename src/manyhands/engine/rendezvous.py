"""How processes that were started by hand find each other without an address: a file in the run's directory.

Rank 0 opens a store on a free port of its own and writes where it is; the others read that, and try again while
nobody answers there, so a file that an earlier start left behind does no harm. A rank that refuses before it comes
leaves its reason there too (engine/refusal.py), which ends those that wait for it. Every rank reports in the store,
so who waits in vain can say whose turn it is. A directory belongs to one training at a time: a second rank 0 finds
the first one answering and gives up.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import DistError, DistNetworkError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from manyhands.engine.refusal import FILE as REFUSAL
from manyhands.engine.refusal import Refusal, refusal_in
from manyhands.errors import RankLost, Refused, WorkerError

FILE = "rendezvous.json"
_MISMATCH = "mismatch"
_LOOK_EVERY_S = 0.1
_STORE_TIMEOUT = timedelta(minutes=10)
_ANSWER_S = 2.0  # how long a store may take to answer before its address counts as stale


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What the file says. `token` tells one start from the next, also when a port comes back."""

    address: str
    port: int
    token: str


def meet(
    directory: Path,
    rank: int,
    world_size: int,
    *,
    wait_s: float,
    address: str | None = None,
    port: int | None = None,
    earlier: Refusal | None = None,
) -> Store:
    """The store in which all ranks of this training are; returns when the last one has come.

    `address`, `port`: where rank 0 is, if it is known; then no file is needed. `earlier`: what lay in the directory
    when this process was started. Raises WorkerError when ranks are missing after `wait_s`, or the port is taken;
    RankLost with the reason of one that has refused; Refused when another training meets in this directory.
    """
    end = time.monotonic() + wait_s
    by_file = address is None or port is None
    if address is not None and port is not None:
        store: Store = _given(rank, world_size, address, port, wait_s)
    elif rank == 0:
        store = _open(directory, address or _own_address())
    else:
        store = _find(directory, rank, world_size, end, wait_s, earlier)

    def look() -> None:
        if by_file:
            _check_refused(directory, earlier, but=(0, rank))  # rank 0 is there: one that refuses is another

    try:
        _check_size(store, rank, world_size)
        _wait_for_all(store, rank, world_size, end, wait_s, look)
    except DistError as error:
        raise WorkerError(
            f"rank {rank} of {world_size}: rank 0 has given up, and has said why ({_first_line(error)[:120]})"
        ) from None
    if by_file and rank == 0:
        (directory / REFUSAL).unlink(missing_ok=True)
    store.set_timeout(_STORE_TIMEOUT)
    return store


def _given(rank: int, world_size: int, address: str, port: int, wait_s: float) -> TCPStore:
    if rank == 0:
        try:
            return _store(address, port, master=True, wait_s=max(_ANSWER_S, wait_s))
        except DistNetworkError as error:
            raise WorkerError(_not_opened(address, port, _first_line(error))) from None
    who, end = f"rank {rank} of {world_size}", time.monotonic() + wait_s
    wait_for_answer(address, port, wait_s, who, "rank 0")
    try:
        return _joined(address, port, max(_ANSWER_S, end - time.monotonic()))
    except (OSError, DistError) as error:
        raise WorkerError(
            f"{who}: what answers at {address}:{port} is no rank 0 of a training ({_first_line(error)}): give the "
            "master_addr and master_port that rank 0 was started with"
        ) from None


def wait_for_answer(address: str, port: int, wait_s: float, who: str, whom: str) -> None:
    """Until `whom`, for whom `who` waits, answers there. Raises WorkerError after `wait_s`."""
    end = time.monotonic() + wait_s
    while True:
        try:
            with socket.create_connection((address, port), timeout=_ANSWER_S):
                return
        except OSError as error:
            if time.monotonic() > end:
                raise WorkerError(
                    f"{who} found nobody at {address}:{port} within {wait_s:g} s ({error.strerror or error}): start "
                    f"{whom} there with the same master_addr and master_port, or raise exec.wait_for_ranks_s"
                ) from None
        time.sleep(_LOOK_EVERY_S)


def check_free(address: str, port: int) -> None:
    """Raises WorkerError for a port that cannot be opened here."""
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server(("", port), family=family):
            pass
    except OSError as error:
        raise WorkerError(_not_opened(address, port, str(error.strerror or error))) from None


def _not_opened(address: str, port: int, why: str) -> str:
    return f"port {port} at {address} cannot be opened ({why}): choose another master_port, or leave it out"


def _open(directory: Path, address: str) -> Store:
    found = _read(directory)
    if found is not None and _answers(found):
        raise Refused(
            f"another training meets in {directory} (at {found.address}:{found.port}): wait for its end, or choose "
            "another name with run=NAME"
        )
    directory.mkdir(parents=True, exist_ok=True)
    store = _store(address, 0, master=True, wait_s=_ANSWER_S)
    meeting = Meeting(address=address, port=store.port, token=uuid.uuid4().hex)
    store.set("token", meeting.token)
    aside = directory / f".{FILE}.{os.getpid()}"
    aside.write_text(json.dumps(asdict(meeting)), encoding="utf-8")
    aside.replace(directory / FILE)
    return store


def _find(
    directory: Path, rank: int, world_size: int, end: float, wait_s: float, earlier: Refusal | None
) -> Store:
    while True:
        found = _read(directory)
        store = None if found is None else _reached(found)
        if store is not None:
            return store
        _check_refused(directory, earlier, but=(rank,))
        if time.monotonic() > end:
            raise WorkerError(
                f"rank {rank} of {world_size} found no rank 0 in {directory} within {wait_s:g} s: start it with the "
                "same run, or raise exec.wait_for_ranks_s"
            )
        time.sleep(_LOOK_EVERY_S)


def _check_refused(directory: Path, earlier: Refusal | None, *, but: Collection[int]) -> None:
    found = refusal_in(directory)
    if found is not None and found != earlier and found.rank not in but:
        raise RankLost(f"rank {found.rank} ended before the ranks met: {found.text}")


def _check_size(store: Store, rank: int, world_size: int) -> None:
    """All ranks must mean the same number of them as rank 0 does; one that does not tells those that wait for it."""
    if rank == 0:
        store.set("world_size", str(world_size))
    elif (expected := int(store.get("world_size"))) != world_size:
        text = f"rank {rank} was started with world_size={world_size}, rank 0 with {expected}"
        text += ": start all with the same"
        store.set(_MISMATCH, text)
        raise WorkerError(text)


def _wait_for_all(
    store: Store, rank: int, world_size: int, end: float, waited_s: float, look: Callable[[], None]
) -> None:
    name = f"rank-{rank}"
    if store.add(name, 1) > 1:
        raise Refused(f"rank {rank} was started twice: give every process its own rank=0 to {world_size - 1}")
    names = [f"rank-{r}" for r in range(world_size)]
    while not store.check(names):
        if store.check([_MISMATCH]):
            raise WorkerError(store.get(_MISMATCH).decode())
        look()
        if time.monotonic() > end:
            missing = [r for r in range(world_size) if not store.check([f"rank-{r}"])]
            raise WorkerError(
                f"rank {', '.join(map(str, missing))} of {world_size} did not come within {waited_s:g} s: start what "
                "is missing, lower world_size, or raise exec.wait_for_ranks_s"
            )
        time.sleep(_LOOK_EVERY_S)


def _read(directory: Path) -> Meeting | None:
    """The file, if there is one that makes sense; it is replaced whole, so anything else is not ours."""
    try:
        value = json.loads((directory / FILE).read_text(encoding="utf-8"))
        return Meeting(
            address=str(value["address"]),
            port=int(value["port"]),
            token=str(value["token"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _answers(meeting: Meeting) -> bool:
    return _reached(meeting) is not None


def _reached(meeting: Meeting) -> Store | None:
    """The store of a meeting; None if nobody answers there, or somebody else does."""
    try:
        with socket.create_connection((meeting.address, meeting.port), timeout=_ANSWER_S):
            pass
        store = _joined(meeting.address, meeting.port, _ANSWER_S)
        if store.check(["token"]) and store.get("token").decode() == meeting.token:
            return store
    except (OSError, DistError):
        pass
    return None


def _store(address: str, port: int, *, master: bool, wait_s: float) -> TCPStore:
    return TCPStore(
        address, port, is_master=master, wait_for_workers=False, timeout=timedelta(seconds=wait_s)
    )


def _joined(address: str, port: int, wait_s: float) -> TCPStore:
    """The store that somebody opened there. Raises OSError or DistError where nobody answers as one.

    By a thread: torch waits without end for a program that takes the connection and says nothing.
    """
    came: queue.Queue[TCPStore | Exception] = queue.Queue()

    def join() -> None:
        try:
            came.put(_store(address, port, master=False, wait_s=wait_s))
        except (DistError, OSError) as error:
            came.put(error)
        except (RuntimeError, ValueError) as error:  # what answers is no store
            came.put(OSError(str(error)))

    threading.Thread(target=join, name="meeting", daemon=True).start()
    try:
        found = came.get(timeout=wait_s + _ANSWER_S)
    except queue.Empty:
        raise TimeoutError(f"it does not answer as one within {wait_s:.0f} s") from None
    if isinstance(found, Exception):
        raise found
    return found


def _own_address() -> str:
    """The name of this machine if it leads back here, else loopback: enough for processes of one machine."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return "127.0.0.1"
    return name


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
