"""`manyhands gpus`: which process of whom uses which NVIDIA GPU of this machine, asked of the driver's library."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from manyhands.ui.command_line import Command

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS: Final = {
    "user": "user",
    "pid": "pid",
    "process": "process",
    "used": "used memory",
    "index": "GPU",
    "name": "name",
    "total": "total memory",
    "uuid": "uuid",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process on a GPU. `used_bytes`: None where the driver does not tell. `user`, `process`: "?" for a process of
    another container, which has no entry here."""

    user: str
    pid: int
    process: str
    used_bytes: int | None
    index: int
    name: str
    total_bytes: int
    uuid: str


@click.command("gpus", cls=Command)
@click.option(
    "--watch", metavar="S", type=click.FloatRange(min=0.1), help="Again every S seconds, until Ctrl+C."
)
@click.option("--user", metavar="NAME", help="Only the processes of this user.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "lines", "json"]),
    help="[default: table on a terminal, else lines]",
)
def gpus(watch: float | None, user: str | None, output: str | None) -> None:
    """Show which process of whom uses which NVIDIA GPU.

    On a terminal a table; through a pipe one unwrapped line per process, fields separated by tabs: user, pid,
    process, used memory, index, name, total memory, uuid. A GPU that nobody uses has no line; json has bytes.
    """
    with _Driver() as driver:
        shape = output or ("table" if sys.stdout.isatty() else "lines")
        if watch is not None and shape == "table":
            _watch(driver, user, watch)
            return
        while True:
            _print(driver.processes(user), driver.gpus(), shape)
            if watch is None:
                return
            sys.stdout.flush()
            time.sleep(watch)


class _Driver:
    """NVML for the time of the context. Raises WorkerError where this machine has no driver or no GPU."""

    def __enter__(self) -> _Driver:
        import pynvml

        from manyhands.errors import WorkerError

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            self._gpus = [
                (index, pynvml.nvmlDeviceGetHandleByIndex(index))
                for index in range(pynvml.nvmlDeviceGetCount())
            ]
        except pynvml.NVMLError as error:
            raise WorkerError(
                f"no NVIDIA GPU can be asked here ({error}): this machine has none, or its driver is not installed; "
                "a container must be started with its GPUs (--gpus all)"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._nvml.nvmlShutdown()

    def gpus(self) -> int:
        return len(self._gpus)

    def processes(self, user: str | None) -> list[GpuProcess]:
        """Those of one user, or of all, by GPU and pid."""
        found = [process for index, handle in self._gpus for process in self._on(index, handle)]
        return sorted(
            (process for process in found if user in (None, process.user)),
            key=lambda process: (process.index, process.pid),
        )

    def _on(self, index: int, handle: Any) -> Iterator[GpuProcess]:
        nvml = self._nvml
        name, uuid = _text(nvml.nvmlDeviceGetName(handle)), _text(nvml.nvmlDeviceGetUUID(handle))
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        listings = (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses)
        seen: dict[int, int | None] = {}
        for listing in listings:
            try:
                seen.update({entry.pid: entry.usedGpuMemory for entry in listing(handle)})
            except nvml.NVMLError_NotSupported:  # graphics, on cards for computing
                continue
        for pid, used in seen.items():
            user, process = _who(pid)
            yield GpuProcess(
                user=user,
                pid=pid,
                process=process,
                used_bytes=used,
                index=index,
                name=name,
                total_bytes=total,
                uuid=uuid,
            )


def _who(pid: int) -> tuple[str, str]:
    import psutil

    try:
        process = psutil.Process(pid)
        return process.username(), process.name()
    except (psutil.Error, KeyError):  # it has ended, or is not of this container
        return "?", "?"


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _print(processes: list[GpuProcess], gpus: int, shape: str) -> None:
    from manyhands.ui.terminal import print_json, printable

    if shape == "json":
        print_json([asdict(process) for process in processes])
    elif shape == "lines":
        for process in processes:
            click.echo("\t".join(printable(cell) for cell in _cells(process)))
    else:
        _console().print(_table(processes, gpus))


def _watch(driver: _Driver, user: str | None, every_s: float) -> None:
    from rich.live import Live

    with Live(_table(driver.processes(user), driver.gpus()), console=_console(), auto_refresh=False) as live:
        while True:
            time.sleep(every_s)
            live.update(_table(driver.processes(user), driver.gpus()), refresh=True)


def _console() -> Any:
    from rich.console import Console

    return Console()


def _table(processes: list[GpuProcess], gpus: int) -> Table:
    from rich.table import Table
    from rich.text import Text

    from manyhands.ui.terminal import printable

    host = os.uname().nodename
    table = Table(
        title=f"{len(processes)} processes on {gpus} GPU{'s' * (gpus != 1)} of {host}", title_justify="left"
    )
    for heading in COLUMNS.values():
        table.add_column(heading, overflow="fold")
    for process in processes:
        table.add_row(*(Text(printable(cell)) for cell in _cells(process)))
    return table


def _cells(process: GpuProcess) -> list[str]:
    from manyhands.ui.terminal import human_bytes

    used = "?" if process.used_bytes is None else human_bytes(process.used_bytes)
    return [
        process.user,
        str(process.pid),
        process.process,
        used,
        str(process.index),
        process.name,
        human_bytes(process.total_bytes),
        process.uuid,
    ]
