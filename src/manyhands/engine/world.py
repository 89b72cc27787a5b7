"""The processes of one training, and this one's place among them.

A training alone has a World too, in which every exchange is the identity, so the loop is written once. Processes
lie on a mesh of data ranks by tensor ranks: those of one tensor group see the same samples.
"""

from __future__ import annotations

import json
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from manyhands.config import differences, shown
from manyhands.engine import exchange
from manyhands.engine.device import CPU, choose_device
from manyhands.engine.settings import Parallel
from manyhands.errors import PlanError, WorkerError

DATA, TENSOR = "data", "tensor"
Summing = Callable[[], torch.Tensor]
BACKGROUND_TIMEOUT = timedelta(hours=24)
"""Preparing data and writing a large checkpoint take what they take."""


_REPORT_S = 5.0
"""How far apart ranks may give up one that they have waited for together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a process stands before it has met the others. `local_*`: among those of its machine; of processes that
    were started by hand nobody knows it before they have met (`met`): 0 of 1 until then.

    `meet` gives the store in which they meet; None: at MASTER_ADDR and MASTER_PORT, as torchrun sets them. `machine`:
    which one this is, where the others are asked for theirs.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    meet: Callable[[], Store] | None = None
    machine: str | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0


def place_from(environment: Mapping[str, str]) -> Place:
    """The place that torchrun gave this process; that of a process alone where it gave none."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Place()
    try:
        return Place(
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            local_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
        )
    except ValueError as error:
        raise PlanError(
            f"RANK, WORLD_SIZE, LOCAL_RANK or LOCAL_WORLD_SIZE is no number ({error}): unset them"
        ) from None


def this_machine() -> str:
    """Alike for all processes of this machine, and for no others: its name, and which of its starts this is."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"


def met(place: Place) -> Place:
    """The place of a process that has met the others: among those of its machine, in the order of their ranks.

    Raises what `meet` raises. A place without a `machine` is known already.
    """
    if place.machine is None or place.meet is None:
        return place
    store = place.meet()
    store.set(f"machine-{place.rank}", place.machine)
    machines = [store.get(f"machine-{rank}").decode() for rank in range(place.world_size)]
    here = [rank for rank, machine in enumerate(machines) if machine == place.machine]
    return replace(
        place,
        local_rank=here.index(place.rank),
        local_size=len(here),
        meet=lambda: store,
        machine=None,
    )


def device_of(place: Place, name: str = "auto") -> torch.device:
    """A process's own device: with several on this machine, rank r has the r-th that CUDA_VISIBLE_DEVICES shows."""
    if place.world_size == 1 or name == "cpu":
        return choose_device(name)
    if name not in ("auto", "cuda"):
        raise WorkerError(
            f"{name} is one device, and there are {place.world_size} processes: leave it out, or choose devices with "
            "CUDA_VISIBLE_DEVICES"
        )
    if not torch.cuda.is_available():
        return choose_device(name)
    visible = torch.cuda.device_count()
    if place.local_size > visible:
        raise WorkerError(
            f"{place.local_size} processes need a CUDA device each, and {visible} are visible: start fewer or choose "
            "cpu"
        )
    return torch.device("cuda", place.local_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """`mesh` is None for a process alone. `background`: a process group of its own for threads that save. `store`: in
    which the ranks have met."""

    device: torch.device = CPU
    rank: int = 0
    size: int = 1
    leads_here: bool = True  # the first process on its machine
    data_rank: int = 0
    data_size: int = 1
    tensor_size: int = 1
    mesh: DeviceMesh | None = None
    background: dist.ProcessGroup | None = None
    store: Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this process logs and saves for all."""
        return self.rank == 0

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """In place: the sum over the data ranks, alike on every rank."""
        if self.mesh is not None and self.data_size > 1:
            dist.all_reduce(values, group=self.mesh[DATA].get_group())
        return values

    def start_sum_over_data(self, values: torch.Tensor) -> Summing:
        """As `sum_over_data`, begun now: what is returned waits for it and gives the sum."""
        if self.mesh is None or self.data_size == 1:
            return lambda: values
        work = dist.all_reduce(values, group=self.mesh[DATA].get_group(), async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return values

        return finish

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """In place: the elementwise maximum over all ranks."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def gather_data(self, value: Any) -> list[Any]:
        """The plain data (JSON) that each data rank brings, in their order, on every rank."""
        if self.mesh is None or self.data_size == 1:
            return [value]
        return exchange.gather(value, self.mesh[DATA].get_group())

    def gather_arrays(self, arrays: Mapping[str, np.ndarray]) -> list[Mapping[str, np.ndarray]]:
        """The arrays that each data rank brings, in their order, on every rank."""
        if self.mesh is None or self.data_size == 1:
            return [arrays]
        return list(exchange.gather_arrays(arrays, self.mesh[DATA].get_group()))

    def told(self, value: Any) -> Any:
        """Rank 0's value, plain data (JSON), on every rank."""
        return value if self.size == 1 else exchange.broadcast(value, leads=self.leads)

    def share(self, tensors: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor] | None:
        """Rank 0's tensors, which are on the CPU, on every rank; None likewise."""
        if self.size == 1:
            return tensors
        leads = tensors if self.leads else None
        table = self.told(None if leads is None else {name: _described(t) for name, t in leads.items()})
        if table is None:
            return None
        shared = {}
        for name, (shape, dtype) in table.items():
            value = torch.empty(shape, dtype=_DTYPES[dtype]) if leads is None else leads[name].contiguous()
            dist.broadcast(value, src=0)
            shared[name] = value
        return shared

    def any(self, asked: bool) -> bool:
        """Whether any rank asks, alike on every rank; no wait for a device."""
        if self.size == 1:
            return asked
        return bool(self.largest(torch.tensor(float(asked))))

    def check_alike(self, what: str, value: object) -> None:
        """Raises PlanError on every rank if one of them has something else than rank 0; that one says what."""
        if self.size == 1:
            return
        theirs, own = self.told(value), json.loads(exchange.as_json(value))
        if self.any(theirs != own):
            odd = [
                f"{path} is {shown(first)} with rank 0 and {shown(second)} here"
                for path, first, second in differences(theirs, own)
                if path
            ]
            if odd:
                what += f" ({'; '.join(odd[:_TOLD])})"
            raise PlanError(
                f"the processes of this training differ in their {what}: start all with the same command line, the "
                "same manyhands and the same data"
            )

    def missing_after(self, error: BaseException) -> list[int]:
        """The ranks for which the others have waited until this error; none if it is of another kind, or all came."""
        if self.store is None or not any(phrase in str(error).lower() for phrase in _TIMED_OUT):
            return []
        names = [f"waited in vain {rank}" for rank in range(self.size)]
        end = time.monotonic() + _REPORT_S
        try:
            self.store.set(names[self.rank], "1")
            while not self.store.check(names) and time.monotonic() < end:
                time.sleep(0.1)
            return [rank for rank, name in enumerate(names) if not self.store.check([name])]
        except dist.DistError:  # it was with a rank that has gone
            return []

    def barrier(self) -> None:
        """Until everybody is here."""
        if self.size > 1:
            dist.barrier()

    def wait_for_leader(self) -> None:
        """As `barrier`, however long rank 0 takes, such as for preparing data."""
        if self.size > 1:
            dist.barrier(self.background)


ALONE = World()
_DTYPES = {
    str(t): t for t in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8)
}


_TOLD = 4
"""So many differences are named."""


def _described(tensor: torch.Tensor) -> tuple[list[int], str]:
    return list(tensor.shape), str(tensor.dtype)


_TIMED_OUT = ("timed out", "timeout")
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "gloo/transport",
)


def is_lost(error: BaseException) -> bool:
    """Whether this is how the end of another rank is felt."""
    return isinstance(error, dist.DistError) or any(phrase in str(error) for phrase in _LOST)


@contextmanager
def enter_world(
    place: Place, device: torch.device, settings: Parallel, *, timeout_s: float = 600.0
) -> Iterator[World]:
    """Join the other processes for the time of the context. Raises PlanError where the sizes do not fit.

    timeout_s: how long one of them waits for the others at a step.
    """
    data_size = data_size_of(place.world_size, settings)
    if place.world_size == 1:
        yield World(device=device)
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    store = place.meet() if place.meet is not None else _store_of_launcher(place)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if on_cuda else None,
    )
    try:
        mesh = init_device_mesh(
            device.type, (data_size, settings.tensor_parallelism), mesh_dim_names=(DATA, TENSOR)
        )
        yield World(
            device=device,
            rank=place.rank,
            size=place.world_size,
            leads_here=place.local_rank == 0,
            data_rank=mesh.get_local_rank(DATA),
            data_size=data_size,
            tensor_size=settings.tensor_parallelism,
            mesh=mesh,
            background=dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT),
            store=store,
        )
    finally:
        dist.destroy_process_group()


def _store_of_launcher(place: Place) -> Store:
    """That of the agent which started this process, at MASTER_ADDR and MASTER_PORT."""
    store, _, _ = next(rendezvous("env://", place.rank, place.world_size))
    return PrefixStore("default_pg", store)


def data_size_of(size: int, settings: Parallel) -> int:
    """Into how many parts so many processes divide a step's samples. Raises PlanError where the sizes do not fit."""
    tensor_size = settings.tensor_parallelism
    if size % tensor_size:
        raise PlanError(
            f"processes={size} cannot be divided into groups of parallel.tensor_parallelism={tensor_size}: start a "
            "multiple of it, or lower it"
        )
    data_size = size // tensor_size
    if settings.data_parallelism not in (None, data_size):
        raise PlanError(
            f"parallel.data_parallelism={settings.data_parallelism} times tensor_parallelism={tensor_size} is not "
            f"{size}, the number of processes: leave data_parallelism out, or start "
            f"{(settings.data_parallelism or 1) * tensor_size}"
        )
    return data_size
