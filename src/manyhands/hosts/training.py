"""One training on one host or several: begun, watched until its end, and what it made brought here.

`begin` returns once it runs there; `watch` can be left at any time, and taken up again from another terminal. The
host that leads (the first) has the events, the checkpoints and the exports; the others only compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

from manyhands.config import home
from manyhands.engine.configuration import Configuration
from manyhands.errors import ManyhandsError, PlanError, ServerUnreachable, WorkerError
from manyhands.hosts.agent import Agent, agent
from manyhands.hosts.connection import connected
from manyhands.hosts.fetch import Fetched, fetch
from manyhands.hosts.follow import EVENTS, Copy, Follower
from manyhands.hosts.hosts_file import Host, host_named
from manyhands.hosts.inputs import inputs_of
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

SHARDS: Final = "shards"
_MANIFEST: Final = "manifest.json"
GRACE_S: Final = 30.0
"""How long the other hosts of a training have to save when one has failed."""
_LOOK_AGAIN_S: Final = 2.0


class View(Protocol):
    """Who is told."""

    def event(self, event: dict[str, Any]) -> None: ...
    def line(self, host: str, text: str) -> None: ...
    def tell(self, text: str) -> None: ...


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a training ended. exit_code: that of the host that failed first, else of the one that leads."""

    exit_code: int
    endings: dict[str, dict[str, Any]]
    fetched: Fetched


@contextlib.asynccontextmanager
async def reached(host: Host, *, docker: bool = False) -> AsyncIterator[Agent]:
    """An agent on a host."""
    async with connected(host) as connection, agent(connection, host, docker=docker) as there:
        yield there


# ---------------------------------------------------------------------------------------- begin
async def begin(hosts: Sequence[Host], wish: Wish, view: View) -> Record:
    """Look at every host, send to every host, start on every host. Nothing runs where one of them cannot.

    Raises what `launch.check_ready` does, and the errors of a connection.
    """
    if len(hosts) > 1:
        _check_divided(wish.configuration)
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
        record = _record(hosts, facts, wish)
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


def _check_divided(configuration: Configuration) -> None:
    """Raises PlanError for a model whose parts would be saved to a directory that all processes see."""
    parallel = configuration.settings.parallel
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


def _job(wish: Wish, host: Host, inputs: Any, rank: int, nodes: int) -> Job:
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


def _record(hosts: Sequence[Host], facts: Sequence[Facts], wish: Wish) -> Record:
    own = wish.directory.resolve() == (home() / "runs" / wish.run).resolve()
    shared = facts[0].shared and own
    parts = tuple(
        Part(
            host=host.host_name, directory=f"{fact.runs}/{wish.run}" + (f"-{rank}" if rank else ""), rank=rank
        )
        for rank, (host, fact) in enumerate(zip(hosts, facts, strict=True))
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


# ---------------------------------------------------------------------------------------- watch
@dataclass(slots=True)
class _Watch:
    """A training that is being watched."""

    directory: Path
    record: Record
    view: View
    saved: asyncio.Event = field(default_factory=asyncio.Event)
    newest: str | None = None
    exporting: bool = False
    failed_first: str | None = None
    fetched: Fetched = field(default_factory=Fetched)

    def host(self, part: Part) -> Host:
        return host_named(part.host)

    def follower(self, part: Part, *, replay: bool) -> Follower:
        leads = part.rank == 0
        own = None if self.record.shared else self.directory
        follower = Follower(
            self.host(part),
            part.directory,
            docker=self.record.docker,
            events=Copy(None if own is None else own / EVENTS) if leads else None,
            log=Copy(self.directory / "logs" / f"{part.host}.log"),
            on_event=self._event,
            on_line=lambda text: self._line(part, text),
            on_status=lambda status: self._status(part, status),
            tell=self.view.tell,
        )
        follower.go_on_from_here(replay=replay)
        return follower

    def _status(self, part: Part, status: dict[str, Any]) -> None:
        if status.get("phase") == "exporting" and not self.exporting:
            self.exporting = True
            self.view.tell(f"{part.host} makes ONNX graphs of the checkpoints")

    def _line(self, part: Part, text: str) -> None:
        """While it trains, its lines say what its events do; they are in the log, and shown if it ends badly."""
        if self.exporting:
            self.view.line(part.host, text)

    def _event(self, event: dict[str, Any]) -> None:
        if event["kind"] == "saved":
            self.newest = Path(str(event["checkpoint"])).name
            self.saved.set()
        self.view.event(event)

    async def bring_checkpoints(self) -> None:
        """Each one as soon as it is whole there, until cancelled."""
        if self.record.shared:
            return
        while True:
            await self.saved.wait()
            self.saved.clear()
            wanted = self.newest
            try:
                fetched = await self.bring()
            except ManyhandsError as error:
                self.view.tell(f"not fetched yet: {error}")
                fetched = Fetched()
            for name in fetched.checkpoints:
                self.view.tell(f"fetched {self.directory / 'checkpoints' / name}")
            if wanted is not None and not (self.directory / "checkpoints" / wanted).is_dir():
                await asyncio.sleep(_LOOK_AGAIN_S)  # it is being written, there
                self.saved.set()

    async def bring(self) -> Fetched:
        part = self.record.parts[0]
        fetched = await fetch(
            self.host(part),
            part.directory,
            self.directory,
            docker=self.record.docker,
            tell=self.view.tell,
            keep=self.record.keep,
        )
        self.fetched.bytes += fetched.bytes
        self.fetched.seconds += fetched.seconds
        return fetched


async def watch(directory: Path, record: Record, view: View, *, replay: bool) -> Outcome:
    """Until the training has ended on all hosts, and what it made is here. Leave it by cancelling.

    replay: the view is told the events that came before as well.

    Raises ServerUnreachable after a long time without a host, StorageError for a full disk here.
    """
    watched = _Watch(directory, record, view)
    followers = {part.host: watched.follower(part, replay=replay) for part in record.parts}
    bringing = asyncio.create_task(watched.bring_checkpoints())
    following = {asyncio.create_task(follower.until_its_end()): host for host, follower in followers.items()}
    endings: dict[str, dict[str, Any]] = {}
    try:
        waiting = set(following)
        while waiting:
            done, waiting = await asyncio.wait(
                waiting,
                return_when=asyncio.FIRST_COMPLETED,
                timeout=GRACE_S if watched.failed_first else None,
            )
            for task in done:
                host = following[task]
                endings[host] = task.result()
                record = record.with_ending(host, endings[host])
                record.keep_in(directory)
                if watched.failed_first is None and exit_code_of(endings[host]) != 0:
                    watched.failed_first = host
                    if waiting:
                        view.tell(f"{host} has ended: the other hosts are asked to save and end")
                        await _stop_others(record, now=False)
            if not done:
                await _stop_others(record, now=True)
    finally:
        bringing.cancel()
        for task in following:
            task.cancel()
        await asyncio.gather(bringing, *following, return_exceptions=True)
    if not record.shared:
        await watched.bring()
    record.model_copy(update={"fetched": True}).keep_in(directory)
    leads = watched.failed_first or record.parts[0].host
    return Outcome(exit_code=exit_code_of(endings[leads]), endings=endings, fetched=watched.fetched)


async def _stop_others(record: Record, *, now: bool) -> None:
    for part in record.parts:
        if part.ending is None:
            with contextlib.suppress(ManyhandsError, TimeoutError):
                await stop(part, docker=record.docker, now=now)


async def stop(part: Part, *, docker: bool, now: bool) -> dict[str, Any]:
    """Ask a part to save and end; `now`: end it at once. Its last status."""
    async with reached(host_named(part.host), docker=docker) as there:
        answer = await there.ask("stop", run=part.directory, now=now)
    status: dict[str, Any] = answer["status"]
    return status


async def state_of(part: Part, *, docker: bool, within_s: float) -> dict[str, Any] | None:
    """The status of a part just now; None where its directory has none. Raises ServerUnreachable after `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            async with reached(host_named(part.host), docker=docker) as there:
                status: dict[str, Any] | None = (await there.ask("status", run=part.directory))["status"]
                return status
    except TimeoutError:
        raise ServerUnreachable(f"{part.host} did not answer within {within_s:g} s") from None


def exit_code_of(ending: dict[str, Any]) -> int:
    """The training's, 128 + number for one that a signal ended; that of a lost worker where nobody knows."""
    return int(ending.get("exit_code", WorkerError.exit_code))


_SIGNALS: Final = {6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


def words_of(host: str, ending: dict[str, Any]) -> str:
    """How a training ended that did not end well, with the last lines that it printed."""
    if ending["state"] == "gone":
        how = f"the run's directory on {host} is gone: its disk was lost, or somebody removed it"
    elif ending["state"] == "lost":
        how = (
            f"{host} was started anew meanwhile, which ended the training"
            if ending.get("restarted")
            else f"the supervisor on {host} was killed, and the training is ended with it; nobody knows its exit code"
        )
    elif ending.get("out_of_memory"):
        how = f"the training on {host} was killed by the kernel, because memory was exhausted"
    elif "signal" in ending:
        how = f"the training on {host} was killed by {_SIGNALS.get(ending['signal'], ending['signal'])}"
    else:
        how = f"the training on {host} ended with exit code {ending['exit_code']}"
    free = ending.get("free_bytes")
    if free is not None and free < 16 << 20:
        how += f"; its disk is full ({free >> 10} KiB free)"
    tail = ending.get("tail") or []
    return how + (
        ". Its last lines:\n" + "\n".join(f"  {line}" for line in tail) if tail else "; it printed nothing"
    )
