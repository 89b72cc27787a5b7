"""Starting a training on hosts: look before, send what it needs, start it detached.

    <WorkDir>/runs/<run>/     plan.yaml, engine.yaml, inputs/, code/ as they are sent; the rest as it comes
    <WorkDir>/venv/           by `hosts setup`

What starts there is the same program as here: `manyhands train --kept`, under a supervisor (on_host/supervisor.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from manyhands import __version__
from manyhands.config import home
from manyhands.engine.configuration import Configuration
from manyhands.errors import DataError, MissingExtra, PlanError, Refused, StorageError, WorkerError
from manyhands.hosts.agent import SUPERVISOR, Agent, program
from manyhands.hosts.connection import Connection
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.inputs import CODE, LARGEST_BYTES, Inputs, Sent
from manyhands.hosts.on_host.files import CHUNK, PARTIAL
from manyhands.plan.needs import Package

LEAST_FREE_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a host has said of itself."""

    host: Host
    python: str
    manyhands: str | None
    gpus: list[dict[str, Any]] | None
    free_bytes: int
    address: str | None
    outputs: str | None
    runs: str
    """The directory in which the run's own will be: on the mount, where there is one."""
    own_runs: str
    """The same in WorkDir."""
    shared: bool
    raw: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One host's share of a training. Of several hosts, `nodes` is their number and `rank` this one's."""

    run: str
    inputs: Inputs
    allowed: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None
    device: str = "auto"
    processes: int = 1
    packages: tuple[Package, ...] = ()
    """That must be installed there."""
    export: bool = True
    resume: str | None = None
    """The checkpoint of the run's directory there that it goes on from."""
    rank: int = 0
    nodes: int = 1
    meet_at: tuple[str, int] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)

    def gpus(self) -> tuple[int, ...] | None:
        """Indexes of those that it must have; None where it takes what there is."""
        kind, _, index = self.device.partition(":")
        if self.devices is not None or kind != "cuda":
            return self.devices
        return (int(index),) if index.isdecimal() else tuple(range(self.processes))


async def look(
    there: Agent, host: Host, *, paths: Sequence[str] = (), packages: Iterable[str] = (), gpus: bool = False
) -> Facts:
    """Ask a host about itself; whether it sees MANYHANDS_HOME of here is tried with a file."""
    outputs = host.path_to_output_from_host
    with _left_for_finding(bool(outputs)) as secret:
        raw = await there.ask(
            "probe",
            work=host.work_dir,
            outputs=outputs,
            secret=secret,
            paths=list(paths),
            packages=list(packages),
            gpus=gpus,
        )
    shared = raw["outputs"] == "shared"
    root = outputs.rstrip("/") if shared and outputs else str(raw["work"])
    return Facts(
        host=host,
        python=raw["executable"],
        manyhands=raw["manyhands"],
        gpus=raw["gpus"],
        free_bytes=raw["free"],
        address=host.address or raw["address"],
        outputs=raw["outputs"],
        runs=f"{root}/runs",
        own_runs=f"{raw['work']}/runs",
        shared=shared,
        raw=raw,
    )


@contextlib.contextmanager
def _left_for_finding(wanted: bool) -> Iterator[str | None]:
    """A file in MANYHANDS_HOME for a while: a host that has it mounted sees its name."""
    if not wanted:
        yield None
        return
    file = home() / f".seen-{secrets.token_hex(8)}"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    try:
        yield file.name
    finally:
        file.unlink(missing_ok=True)


def check_ready(facts: Facts, job: Job) -> None:
    """What keeps this job from running there. Raises WorkerError, Refused, DataError, StorageError, MissingExtra."""
    name, raw = facts.host.host_name, facts.raw
    container = (
        " or train in their containers (exec.run_in_docker=true)" if facts.host.docker_launch_command else ""
    )
    if facts.manyhands is None:
        raise WorkerError(
            f"{name} has no manyhands for {facts.python}: install it with `manyhands hosts setup {name}`{container}"
        )
    if facts.manyhands != __version__:
        raise Refused(
            f"{name} has manyhands {facts.manyhands}, and here it is {__version__}: make them the same with "
            f"`manyhands hosts setup {name}`{container}"
        )
    if raw["torch"] is None:
        raise WorkerError(
            f"{name} has no torch for {facts.python}: install what is missing with `manyhands hosts setup {name}`"
            f"{container}"
        )
    check_devices(facts, job.devices if facts.gpus is None else job.gpus())
    if not raw["writable"]:
        raise StorageError(
            f"{name}: {raw['work']} cannot be written: choose another WorkDir in the hosts' file, or let "
            "yourself write there"
        )
    if facts.free_bytes < LEAST_FREE_BYTES:
        raise StorageError(
            f"{name}: {facts.free_bytes >> 20} MiB are free at {raw['work']}, {LEAST_FREE_BYTES >> 20} MiB is the "
            "least to start with: free space there, or choose another WorkDir"
        )
    lacking = [package for package in job.packages if not raw["packages"][package.module]]
    if lacking:
        raise MissingExtra(
            f"{name} has no package {lacking[0].module!r}, which {lacking[0].option} needs: install it with "
            f"{setup_with(name, {package.extra for package in lacking})}"
        )
    missing = [path for path, there in raw["paths"].items() if not there]
    if missing and missing[0] in job.inputs.large:
        raise DataError(
            f"{name} has no {missing[0]}, and here it is more than is sent with a training (in all "
            f"{LARGEST_BYTES / 2**30:g} GiB): put it there, at the same path or with another one in the plan"
        )
    if missing:
        raise DataError(
            f"{name} has no {missing[0]}: give the path as that host sees it, or send what is here (--upload-shards "
            "DIR; small files that the plan names are sent by themselves)"
        )


def setup_with(name: str, extras: Iterable[str]) -> str:
    """The command that installs these there."""
    return f"`manyhands hosts setup {name} --extras {','.join(sorted(extras))}`"


def check_devices(facts: Facts, devices: Sequence[int] | None) -> None:
    """Raises WorkerError for an index that the host has no GPU for."""
    if devices is None:
        return
    count = len(facts.gpus or ())
    wrong = next((index for index in devices if index >= count), None)
    if wrong is not None:
        there = ", ".join(f"{i} {gpu['name']}" for i, gpu in enumerate(facts.gpus or ())) or "none"
        raise WorkerError(
            f"{facts.host.host_name} has no GPU {wrong} (it has: {there}): choose another with --devices, or leave "
            "it out to train on what there is"
        )
    if len(set(devices)) < len(devices):
        raise PlanError(f"--devices {','.join(map(str, devices))}: name each GPU once")


def configured_for(host: Host, configuration: Configuration, inputs: Inputs) -> dict[str, str]:
    """The texts of plan.yaml and engine.yaml as this host gets them."""
    settings = configuration.settings
    if host.override_py_torch_compile_mode is not None:
        execution = settings.exec.model_copy(update={"compile": host.override_py_torch_compile_mode})
        settings = settings.model_copy(update={"exec": execution})
    there = Configuration(plan=inputs.plan, settings=settings, start=configuration.start)
    return there.as_files()


async def send(
    there: Agent, directory: str, texts: Mapping[str, str], files: Sequence[Sent], tell: Callable[[str], None]
) -> None:
    """The configuration and the inputs of a run. Raises StorageError."""
    size = sum(sent.file.stat().st_size for sent in files)
    if size > 8 << 20:
        tell(f"sending {len(files)} files, {size / 2**20:.0f} MiB")
    for name, text in texts.items():
        await there.ask("put", text.encode(), path=f"{directory}/{name}", offset=0, last=True)
    for sent in files:
        await send_file(there, sent.file, f"{directory}/{sent.name}")


async def send_file(there: Agent, file: Path, path: str, *, sftp: Connection | None = None) -> int:
    """A file of any size to the host; what is there already, of this or an earlier attempt, is not sent again.

    sftp: by this connection's, where it has one; the agent compares the hashes, and sends what is missing.
    Returns how many bytes the agent sent. Raises StorageError, ServerUnreachable.
    """
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        whole: dict[str, Any] = {"path": path, "hashes": hashes_of(file, size), "bytes": size}
        offset = int((await there.ask("partial", **whole))["offset"])
        if offset == 0 and sftp is not None and await sftp.put(file, path + PARTIAL):
            offset = int((await there.ask("partial", **whole))["offset"])
        if offset < 0:
            return 0
        first = min(offset, size)
        opened.seek(first)
        await there.put_all(opened, path, first, size)
    return size - first


def hashes_of(file: Path, size: int) -> list[str]:
    """SHA-256 of each chunk of its first `size` bytes, as the host's agent has them of its files."""
    with file.open("rb") as opened:
        lengths = (min(CHUNK, size - offset) for offset in range(0, size, CHUNK))
        return [hashlib.sha256(opened.read(length)).hexdigest() for length in lengths]


async def start(there: Agent, facts: Facts, job: Job, directory: str) -> dict[str, Any]:
    """Start the supervisor; its first status. Raises WorkerError where it cannot begin."""
    answer = await there.ask(
        "start",
        run=directory,
        supervisor=program(SUPERVISOR),
        job={
            "command": command_of(facts, job, directory),
            "export": _export(facts, job, directory),
            "environment": environment_of_job(facts.host, job, directory),
            "rank": job.rank,
        },
    )
    status: dict[str, Any] = answer["status"]
    return status


def command_of(facts: Facts, job: Job, directory: str) -> list[str]:
    """What trains there: the same program, with the configuration of that directory."""
    command = [facts.python, "-m", "manyhands", "train", "--kept", "--directory", directory]
    command += ["--logs", "console"]  # to its log; here the events are shown
    for target in job.allowed:
        command += ["--allow-task", target]
    if job.resume is not None:
        command += ["--resume", f"{directory}/checkpoints/{job.resume}"]
    if job.meet_at is not None:
        address, port = job.meet_at
        command += [f"nodes={job.nodes}", f"node_rank={job.rank}", f"processes={job.processes}"]
        command += [f"master_addr={address}", f"master_port={port}"]
    elif job.processes > 1:
        command += [f"processes={job.processes}"]
    return command


def environment_of_job(host: Host, job: Job, directory: str) -> dict[str, str]:
    """On top of what a login there has."""
    environment = {
        "PYTHONUNBUFFERED": "1",
        "MANYHANDS_HOME": host.work_dir,
        **host.environment,
        **job.environment,
    }
    if job.devices is not None:
        environment |= {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, job.devices)),
        }
    if any(sent.name.startswith(f"{CODE}/") for sent in job.inputs.files):
        environment["PYTHONPATH"] = f"{directory}/{CODE}"
    return environment


def _export(facts: Facts, job: Job, directory: str) -> list[str] | None:
    if not job.export or job.rank != 0:
        return None
    command = ["nice", facts.python, "-m", "manyhands.hosts.export_kept", directory]
    for target in job.allowed:
        command += ["--allow-task", target]
    return command


def kept_here(directory: Path, texts: Mapping[str, str]) -> None:
    """The same configuration beside the record here, so that a checkpoint that comes back belongs to it. Raises
    StorageError.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{directory}: {error.strerror}; choose another --directory") from error
