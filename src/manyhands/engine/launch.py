"""Starts the processes of a training on this machine, by torch's elastic agent, and starts them again when they die.

The first death ends the group. A process that ended with one of our own errors has said what is wrong, and starting
it again would not help; one that was killed, or crashed, is started again with all the others, from the last
checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from manyhands.engine.rendezvous import check_free, wait_for_answer
from manyhands.errors import Interrupted, RankLost, WorkerError

_CRASH = 1  # the exit code of what nobody expected; higher ones are of our own errors (errors.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The machines of a training, `rank` this one's number; rank 0's processes meet the others at its address."""

    count: int
    rank: int
    address: str
    port: int
    wait_s: int = 120


def launch(
    command: Sequence[str],
    processes: int,
    *,
    restarts: int,
    again: Sequence[str],
    tell: Callable[[str], None],
    among: Nodes | None = None,
) -> int:
    """Run `python <command>` as so many processes; on a restart with `again` behind it. Returns the exit code.

    `tell` is called with a sentence for each restart. among: other machines do the same; then nothing is started
    again, since all would have to agree on it. Raises Interrupted after SIGINT or SIGTERM, which the processes have
    got too, and have had time to save.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # they tell their errors themselves
    arguments = list(command)
    restarts = restarts if among is None else 0
    for attempt in range(restarts + 1):
        try:
            _run(arguments, processes, among)
            return 0
        except SignalException as error:
            raise Interrupted(f"{signal.Signals(error.sigval).name}: the processes were ended") from None
        except (DistError, RendezvousError) as error:
            if among is None:
                raise
            raise WorkerError(
                f"machine {among.rank} of {among.count}: not all machines came within {among.wait_s} s "
                f"({str(error).splitlines()[0]}): start each with its own node_rank=0 to {among.count - 1}, lower "
                "nodes, or raise exec.wait_for_ranks_s"
            ) from None
        except ChildFailedError as error:
            rank, failure = _first(error.failures)
            if failure.exitcode > _CRASH:
                return failure.exitcode
            told = f"rank {rank} {_ending(failure)}"
            if attempt == restarts:
                tell(
                    f"{told}; it was started {_times(attempt + 1)} and is given up (exec.restarts={restarts})"
                )
                return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            tell(f"{told}: starting again from the last checkpoint ({attempt + 1} of {restarts})")
            arguments = [*command, *again]
    raise AssertionError("unreachable")


def choose_devices(indexes: Sequence[int]) -> None:
    """Let the processes see these devices only: indexes within what CUDA_VISIBLE_DEVICES shows.

    Raises WorkerError for an index that is not there, or twice.
    """
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(i) for i in range(torch.cuda.device_count())]
    if shown:
        visible = shown.split(",")
    for index in indexes:
        if not 0 <= index < len(visible) or list(indexes).count(index) > 1:
            there = f"0 to {len(visible) - 1}" if visible else "none"
            raise WorkerError(
                f"--devices {','.join(map(str, indexes))}: there is no device {index} for a process of its own "
                f"(indexes of what CUDA_VISIBLE_DEVICES shows: {there}); on a CPU give processes=N"
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] for i in indexes)


def _run(command: list[str], processes: int, among: Nodes | None) -> None:
    if among is not None and among.rank == 0:
        check_free(among.address, among.port)
    elif among is not None:
        who = f"machine {among.rank} of {among.count}"
        wait_for_answer(among.address, among.port, among.wait_s, who, "the one with node_rank=0")
    config = LaunchConfig(
        min_nodes=1 if among is None else among.count,
        max_nodes=1 if among is None else among.count,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex if among is None else "manyhands",
        rdzv_backend="c10d" if among is None else "static",
        rdzv_endpoint="127.0.0.1:0" if among is None else f"{among.address}:{among.port}",
        rdzv_configs={} if among is None else {"rank": among.rank, "timeout": among.wait_s},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(),
    )
    with _signals_kept():
        elastic_launch(config, sys.executable)(*command)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """torch's agent takes the signals of this process for its own, and leaves them so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT")
    before = {name: signal.getsignal(getattr(signal, name)) for name in names if hasattr(signal, name)}
    try:
        yield
    finally:
        for name, handler in before.items():
            if handler is not None:  # else it is none of Python's
                signal.signal(getattr(signal, name), handler)


def _first(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The failure that brought the others down: not of one that only lost the others, nor was ended by the agent."""

    def order(entry: tuple[int, ProcessFailure]) -> tuple[bool, bool, float]:
        failure = entry[1]
        return (
            failure.exitcode == RankLost.exit_code,
            failure.exitcode == -signal.SIGTERM,
            failure.timestamp,
        )

    return min(failures.items(), key=order)


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _ending(failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"was killed by {signal.Signals(-failure.exitcode).name}"
    return f"ended with code {failure.exitcode}"
