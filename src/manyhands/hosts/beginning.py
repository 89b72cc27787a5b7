"""A training begun on one host or several: looked at, sent to, started. Nothing runs where one of them cannot.

The host that leads (the first) has the events, the checkpoints and the exports; the others only compute.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from manyhands.config import home
from manyhands.engine.configuration import Configuration
from manyhands.errors import PlanError, WorkerError
from manyhands.hosts.agent import Agent, reached
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.inputs import Inputs, inputs_of
from manyhands.hosts.launch import (
    Facts,
    Job,
    check_ready,
    configured_for,
    kept_here,
    look,
    send,
    send_file,
    start,
)
from manyhands.hosts.record import Part, Record
from manyhands.hosts.watching import View

SHARDS: Final = "shards"
_MANIFEST: Final = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a command line asks for beside the configuration."""

    configuration: Configuration
    run: str
    directory: Path
    allowed: tuple[str, ...] = ()
    devices: tuple[int, ...] | None = None
    export: bool = True
    docker: bool = False
    paths: tuple[str, ...] = ()
    """Of the host, that must be there."""
    upload: Path | None = None
    """Shards of this machine that are sent."""


async def begin(hosts: Sequence[Host], wish: Wish, view: View) -> Record:
    """Look at every host, send to every host, start on every host. Nothing runs where one of them cannot.

    Raises what `launch.check_ready` does, and the errors of a connection.
    """
    _check_wish(hosts, wish)
    if wish.upload is not None:
        plan = wish.configuration.plan
        data = plan.data.model_copy(update={"shards": f"../../{SHARDS}/{_name_of_shards(wish.upload)}"})
        configuration = replace(wish.configuration, plan=plan.model_copy(update={"data": data}))
        wish = replace(wish, configuration=configuration)
    inputs = inputs_of(wish.configuration.plan, wish.allowed)
    async with AsyncExitStack() as stack:
        if not wish.docker and len(hosts) == 1 and await _only_in_container(hosts[0]):
            view.tell(f"{hosts[0].host_name} trains in its container: it has no manyhands outside")
            wish = replace(wish, docker=True)
        agents = await asyncio.gather(
            *(stack.enter_async_context(reached(host, docker=wish.docker)) for host in hosts)
        )
        jobs = [_job(wish, host, inputs, rank, len(hosts)) for rank, host in enumerate(hosts)]
        facts = await asyncio.gather(
            *(
                look(there, host, paths=(*inputs.elsewhere, *wish.paths), gpus=job.devices is not None)
                for there, host, job in zip(agents, hosts, jobs, strict=True)
            )
        )
        for fact, job in zip(facts, jobs, strict=True):
            check_ready(fact, job)
        _tell_of_outputs(facts, view)
        record = _record(facts, wish)
        if len(hosts) > 1:
            jobs = await _meeting(agents[0], facts[0], jobs)
        texts = [configured_for(host, wish.configuration, inputs) for host in hosts]
        for there, part, text in zip(agents, record.parts, texts, strict=True):
            await send(there, part.directory, text, inputs.files, view.tell)
            if wish.configuration.start.resume is not None:
                await _send_checkpoint(there, wish.directory, part.directory, view)
            if wish.upload is not None:
                await _upload(there, wish.upload, part.directory, view)
        if not record.shared:
            kept_here(wish.directory, texts[0])
        record.keep_in(wish.directory)
        for there, fact, job, part in zip(agents, facts, jobs, record.parts, strict=True):
            await start(there, fact, job, part.directory)
            view.tell(f"started on {part.host}, in {part.directory}")
    return record


async def _send_checkpoint(there: Agent, directory: Path, run: str, view: View) -> None:
    """The newest that is here, to a host that has none of this training."""
    listed = await there.ask("listing", path=f"{run}/checkpoints")
    here = sorted(p for p in (directory / "checkpoints").glob("step-*") if p.is_dir())
    if listed["files"] or not here:
        return
    view.tell(f"sending {here[-1]}")
    for file in sorted(f for f in here[-1].rglob("*") if f.is_file()):
        await send_file(there, file, f"{run}/{file.relative_to(directory).as_posix()}")


async def _upload(there: Agent, shards: Path, run: str, view: View) -> None:
    """Shards, beside the runs; what is there already is not sent again."""
    place = f"{run}/../../{SHARDS}/{_name_of_shards(shards)}"
    files = sorted(file for file in shards.rglob("*") if file.is_file() and not file.name.startswith("."))
    files.sort(key=lambda file: file.name == _MANIFEST)  # last: what lies beside it is whole
    size = sum(file.stat().st_size for file in files)
    view.tell(f"sending {len(files)} files of shards, {size / 2**20:,.0f} MiB")
    sent = sum([await send_file(there, f, f"{place}/{f.relative_to(shards).as_posix()}") for f in files])
    view.tell(f"sent {sent / 2**20:,.0f} MiB of shards; the rest was there")


def _name_of_shards(shards: Path) -> str:
    digest = hashlib.sha256((shards / _MANIFEST).read_bytes()).hexdigest()[:12]
    return f"{shards.resolve().name}-{digest}"


def _check_wish(hosts: Sequence[Host], wish: Wish) -> None:
    """Raises PlanError for what cannot be meant, or needs a directory that all processes see."""
    without = next((host.host_name for host in hosts if host.docker_launch_command is None), None)
    if wish.docker and without is not None:
        raise PlanError(
            f"exec.run_in_docker=true: {without} has no DockerLaunchCommand in the hosts' file, as 'docker exec -it "
            "NAME'"
        )
    parallel = wish.configuration.settings.parallel
    if len(hosts) == 1:
        return
    if parallel.strategy == "fsdp" or parallel.tensor_parallelism > 1:
        raise PlanError(
            "a model that is divided among processes is saved by all of them into one directory, and hosts have none "
            "in common: train it with parallel.strategy=ddp on several hosts, or on one host"
        )


async def _only_in_container(host: Host) -> bool:
    """Whether a host that has a DockerLaunchCommand lacks Python or manyhands outside of the container."""
    if host.docker_launch_command is None:
        return False
    try:
        async with reached(host) as there:
            return (await look(there, host)).manyhands is None
    except WorkerError:
        return True


def _job(wish: Wish, host: Host, inputs: Inputs, rank: int, nodes: int) -> Job:
    devices = wish.devices if wish.devices is not None else host.devices
    asked = wish.configuration.start.processes
    if asked is not None and devices is not None and asked != len(devices):
        raise PlanError(
            f"devices {','.join(map(str, devices))} are {len(devices)}, processes={asked}: give one of the two"
        )
    return Job(
        run=wish.run,
        inputs=inputs,
        allowed=wish.allowed,
        devices=devices,
        processes=asked or len(devices or (0,)),
        export=wish.export,
        resume=wish.configuration.start.resume is not None,
        rank=rank,
        nodes=nodes,
    )


async def _meeting(first: Agent, facts: Facts, jobs: Sequence[Job]) -> list[Job]:
    """Where the processes of all hosts meet: a free port of the first, at an address that the others reach."""
    if facts.address is None:
        raise PlanError(
            f'{facts.host.host_name} leads, and its address for the other hosts is not known: give "Address" in the '
            "hosts' file"
        )
    port = (await first.ask("free_port"))["port"]
    return [replace(job, meet_at=(facts.address, int(port))) for job in jobs]


def _tell_of_outputs(facts: Sequence[Facts], view: View) -> None:
    for fact in facts:
        if fact.outputs is not None and not fact.shared:
            view.tell(
                f"{fact.host.host_name}: {fact.host.path_to_output_from_host} is {fact.outputs}, so results come "
                "back over the connection"
            )


def _record(facts: Sequence[Facts], wish: Wish) -> Record:
    own = wish.directory.resolve() == (home() / "runs" / wish.run).resolve()
    shared = facts[0].shared and own
    parts = tuple(
        Part(
            host=fact.host.host_name,
            directory=f"{fact.own_runs if rank else fact.runs}/{wish.run}",
            rank=rank,
        )
        for rank, fact in enumerate(facts)
    )
    plan, settings = wish.configuration.plan, wish.configuration.settings
    return Record(
        run=wish.run,
        parts=parts,
        samples_per_step=plan.local.batch_size,
        keep=settings.checkpoints.keep,
        shared=shared,
        docker=wish.docker,
    )
