"""A training begun on one host or several: looked at, sent to, started. Nothing runs where one of them cannot.

The host that leads (the first) has the events, the checkpoints and the exports; the others only compute.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Final

from manyhands import __version__
from manyhands.config import runs_directory
from manyhands.config.extras import EXTRAS
from manyhands.data.shards.manifest import MANIFEST
from manyhands.engine.configuration import Configuration
from manyhands.errors import ManyhandsError, PlanError, ServerUnreachable, WorkerError
from manyhands.hosts.agent import Agent, reached
from manyhands.hosts.going_on import (
    Found,
    Origin,
    check_here,
    check_plan,
    found_there,
    leave_newer,
    leave_newer_there,
    origin_of,
    send_events,
    send_origin,
)
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
    setup_with,
    start,
)
from manyhands.hosts.record import Part, Record, recorded
from manyhands.hosts.watching import View
from manyhands.plan.safety import check_allowed
from manyhands.plan.tasks import CustomTask

SHARDS: Final = "shards"
MARK: Final = ".host"
"""In the run's directory there: whose it is."""
EXPORTING: Final = EXTRAS["onnx"]
"""What a host exports with; without them it trains all the same."""
RUN_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"


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

    Raises PlanError and DataError for what no host can do: another training has this name, the checkpoint to go on
    from is missing; what `launch.check_ready` does, and the errors of a connection, for a host that cannot.
    """
    _check_wish(hosts, wish)
    resume = wish.configuration.start.resume
    check_here(wish.directory, resume)
    if wish.upload is not None:
        wish = _on_shards_of(wish, wish.upload)
    inputs = inputs_of(wish.configuration.plan, wish.allowed)
    async with AsyncExitStack() as stack:
        inside = await asyncio.gather(*(_in_container(host, wish, view) for host in hosts))
        agents = await asyncio.gather(
            *(stack.enter_async_context(reached(h, docker=d)) for h, d in zip(hosts, inside, strict=True))
        )
        jobs = [_job(wish, host, inputs, rank, len(hosts)) for rank, host in enumerate(hosts)]
        facts = await asyncio.gather(
            *(
                look(
                    there,
                    host,
                    paths=(*inputs.elsewhere, *wish.paths),
                    packages={*EXPORTING, *(package.module for package in job.packages)},
                    gpus=job.gpus() is not None,
                )
                for there, host, job in zip(agents, hosts, jobs, strict=True)
            )
        )
        for fact, job in zip(facts, jobs, strict=True):
            check_ready(fact, job)
        _tell_of_outputs(facts, view)
        _tell_of_exports(facts[0], jobs[0], view)
        record = _record(facts, wish, inside)
        own = repeat(recorded(wish.directory) is not None)
        found = await asyncio.gather(*map(found_there, agents, record.parts, repeat(resume), own))
        origin = None if resume is None else origin_of(wish.directory, resume, found[0])
        if origin is not None:
            check_plan(wish.directory, origin, inputs.plan)
            jobs = [replace(job, resume=origin.name) for job in jobs]
        if len(hosts) > 1:
            await _check_apart(agents, record)
            jobs = await _meeting(agents[0], facts[0], jobs)
        begun = [
            _Begun(there=there, facts=fact, job=job, part=part, found=has)
            for there, fact, job, part, has in zip(agents, facts, jobs, record.parts, found, strict=True)
        ]
        for one in begun:
            await _send_all(one, wish, origin, view)
        if origin is not None:
            for one in begun:
                await leave_newer_there(one.there, origin, one.part, view.tell)
            if not record.shared:
                leave_newer(wish.directory, origin)
        if not record.shared:
            kept_here(wish.directory, configured_for(hosts[0], wish.configuration, inputs))
        await _start_all(begun, record, wish.directory, view)
    return record


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """What is known of one host while a training is begun on it."""

    there: Agent
    facts: Facts
    job: Job
    part: Part
    found: Found


async def _send_all(one: _Begun, wish: Wish, origin: Origin | None, view: View) -> None:
    """All that the training needs there, the checkpoint last."""
    texts = configured_for(one.facts.host, wish.configuration, one.job.inputs)
    await send(one.there, one.part.directory, texts, one.job.inputs.files, view.tell)
    if wish.upload is not None:
        await _upload(one.there, wish.upload, one.part.directory, view)
    if origin is not None:
        if one.part.rank == 0:
            await send_events(one.there, one.part, wish.directory, one.found)
        await send_origin(one.there, one.facts, origin, one.found, one.part.directory, view.tell)


async def _start_all(begun: Sequence[_Begun], record: Record, directory: Path, view: View) -> None:
    """The record first: what runs is never unknown here. Where one cannot start, those that have are ended."""
    before = recorded(directory)
    record.keep_in(directory)
    for number, one in enumerate(begun):
        try:
            await start(one.there, one.facts, one.job, one.part.directory)
        except ManyhandsError as error:
            asked = [*begun[:number], *((one,) if isinstance(error, ServerUnreachable) else ())]
            if await _ended(asked, view):
                record.forget_in(directory, before)
            raise
        view.tell(f"started on {one.part.host}, in {one.part.directory}")


async def _ended(begun: Sequence[_Begun], view: View) -> bool:
    """End what runs there; whether it is certain that nothing does."""
    certain = True
    for one in begun:
        try:
            await one.there.ask("stop", run=one.part.directory, now=True)
            view.tell(f"ended on {one.part.host}: it cannot train without the others")
        except ManyhandsError as error:
            view.tell(f"{one.part.host} could not be asked to end: {error}")
            certain = False
    return certain


def _on_shards_of(wish: Wish, shards: Path) -> Wish:
    """With the plan's data where the shards of this machine will be, seen from the run's directory there."""
    plan = wish.configuration.plan
    data = plan.data.model_copy(update={"shards": f"../../{SHARDS}/{_name_of_shards(shards)}"})
    configuration = replace(wish.configuration, plan=plan.model_copy(update={"data": data}))
    return replace(wish, configuration=configuration)


async def _upload(there: Agent, shards: Path, run: str, view: View) -> None:
    """Shards, beside the runs; what is there already is not sent again."""
    place = f"{run}/../../{SHARDS}/{_name_of_shards(shards)}"
    files = sorted(file for file in shards.rglob("*") if file.is_file() and not file.name.startswith("."))
    files.sort(key=lambda file: file.name == MANIFEST)  # last: what lies beside it is whole
    size = sum(file.stat().st_size for file in files)
    view.tell(f"sending {len(files)} files of shards, {size / 2**20:,.0f} MiB")
    sent = sum([await send_file(there, f, f"{place}/{f.relative_to(shards).as_posix()}") for f in files])
    view.tell(f"sent {sent / 2**20:,.0f} MiB of shards; the rest was there")


def _name_of_shards(shards: Path) -> str:
    digest = hashlib.sha256((shards / MANIFEST).read_bytes()).hexdigest()[:12]
    return f"{shards.resolve().name}-{digest}"


def _check_wish(hosts: Sequence[Host], wish: Wish) -> None:
    """Raises PlanError for what cannot be meant, is not allowed, or needs a directory that all processes see."""
    if not re.fullmatch(RUN_NAME, wish.run):
        raise PlanError(
            f"the run would be called {wish.run!r} on the host: give --directory another name, of letters, digits, "
            "'.', '_' and '-'"
        )
    task = wish.configuration.plan.task
    if isinstance(task, CustomTask):
        check_allowed(task, wish.allowed)
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


async def _in_container(host: Host, wish: Wish, view: View) -> bool:
    """Whether it trains in its container: where that is wished, or where it lacks Python, this version or torch
    outside of it.
    """
    if wish.docker or host.docker_launch_command is None:
        return wish.docker
    try:
        async with reached(host) as there:
            facts = await look(there, host)
            lacks = facts.manyhands != __version__ or facts.raw["torch"] is None
    except WorkerError:
        lacks = True
    if lacks:
        view.tell(
            f"{host.host_name} trains in its container: outside it has no manyhands {__version__} that can train"
        )
    return lacks


def _job(wish: Wish, host: Host, inputs: Inputs, rank: int, nodes: int) -> Job:
    devices = wish.devices if wish.devices is not None else host.devices
    return Job(
        run=wish.run,
        inputs=inputs,
        allowed=wish.allowed,
        devices=devices,
        device=wish.configuration.settings.exec.device,
        processes=wish.configuration.processes(devices, nodes),
        packages=wish.configuration.packages(),
        export=wish.export,
        rank=rank,
        nodes=nodes,
    )


async def _check_apart(agents: Sequence[Agent], record: Record) -> None:
    """Raises PlanError where two hosts have the run's directory in common: each writes a status of its own there."""
    owners: dict[str, str] = {}
    for there, part in zip(agents, record.parts, strict=True):
        mark = secrets.token_hex(8)
        owners[mark] = part.host
        await there.ask("put", mark.encode(), path=f"{part.directory}/{MARK}", offset=0, last=True)
    for there, part in zip(agents, record.parts, strict=True):
        found = (await there.ask("text", path=f"{part.directory}/{MARK}", bytes=64))["text"]
        if owners.get(found) != part.host:
            raise PlanError(
                f"{part.host} and {owners.get(found, 'another host')} have {part.directory} in common, as with one "
                "home on both: give them a WorkDir each in the hosts' file"
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


def _tell_of_exports(leads: Facts, job: Job, view: View) -> None:
    """Before the training, not after it: a graph can be made here as well, but who knows it late has no choice."""
    if job.export and not all(leads.raw["packages"][module] for module in EXPORTING):
        name = leads.host.host_name
        view.tell(
            f"{name} cannot export checkpoints as ONNX ({setup_with(name, ['onnx'])} lets it): export them here"
        )


def _record(facts: Sequence[Facts], wish: Wish, inside: Sequence[bool]) -> Record:
    own = wish.directory.resolve() == (runs_directory() / wish.run).resolve()
    shared = facts[0].shared and own
    parts = tuple(
        Part(
            host=fact.host.host_name,
            directory=f"{fact.own_runs if rank else fact.runs}/{wish.run}",
            docker=docker,
            rank=rank,
        )
        for rank, (fact, docker) in enumerate(zip(facts, inside, strict=True))
    )
    plan, settings = wish.configuration.plan, wish.configuration.settings
    return Record(
        run=wish.run,
        parts=parts,
        samples_per_step=plan.local.batch_size,
        keep=settings.checkpoints.keep,
        shared=shared,
    )
