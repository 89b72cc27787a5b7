"""What a training that is begun finds of its name, here and on the hosts: nothing, or what it goes on from.

A checkpoint is sent into a hidden directory that gets its name at the end: one that was cut off is none. Where an
older checkpoint is gone on from, the newer ones here are moved into `aside/`, as the engine does there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manyhands.config.checkpoint_names import TRAINING, is_name, number_of, numbered
from manyhands.engine.kept_checkpoints import check_made_with, check_plan_of, kept_plan
from manyhands.errors import DataError, PlanError, StorageError
from manyhands.hosts.agent import Agent
from manyhands.hosts.follow import EVENTS
from manyhands.hosts.inputs import CODE, INPUTS
from manyhands.hosts.launch import Facts, hashes_of, send_file
from manyhands.hosts.on_host import trainings
from manyhands.hosts.record import Part, recorded
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan

CHECKPOINTS: Final = "checkpoints"
_RENAME: Final = "import os, sys; os.rename(sys.argv[1], sys.argv[2])"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a host has of the run: the files of each checkpoint with their sizes; the size of its events."""

    checkpoints: Mapping[str, Mapping[str, int]]
    events: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The checkpoint that a training goes on from. `here` None: only the host that leads has it."""

    name: str
    here: Path | None


def check_here(directory: Path, resume: str | None) -> None:
    """Raises PlanError where the directory has a training that is not gone on with, or that has not ended."""
    record = recorded(directory)
    if record is not None and not record.ended:
        raise PlanError(
            f"{directory}: its training on {', '.join(part.host for part in record.parts)} goes on, or nobody has "
            f"seen its end: see it with `manyhands hosts attach {directory}`, or choose another run=NAME"
        )
    if resume is not None:
        return
    if record is not None and not numbered(directory / CHECKPOINTS, TRAINING):
        return  # it has ended before there was anything to go on from
    if record is not None or (directory / EVENTS).exists() or numbered(directory / CHECKPOINTS, TRAINING):
        raise PlanError(
            f"{directory} has a training already: go on with it (--resume {directory}), or choose another "
            "run=NAME or --directory"
        )


async def found_there(there: Agent, part: Part, resume: str | None, own: bool = False) -> Found:
    """What the host has of the run. Raises PlanError where one runs there, or is not to be gone on with.

    own: what is there was begun from here, and has ended.
    """
    status = (await there.ask("status", run=part.directory))["status"]
    if status is not None and status["state"] == "running":
        raise PlanError(
            f"{part.host}: a training runs in {part.directory} already: choose another run=NAME, or wait for its end"
        )
    listed = await there.ask("listing", path=part.directory, without=["materials", INPUTS, CODE])
    checkpoints: dict[str, dict[str, int]] = defaultdict(dict)
    events = 0
    for name, size in listed["files"]:
        first, _, rest = name.partition("/")
        checkpoint, _, file = rest.partition("/")
        if first == CHECKPOINTS and file and is_name(checkpoint, TRAINING):
            checkpoints[checkpoint][file] = size
        elif name == EVENTS:
            events = size
    if resume is None and (checkpoints or (events and not own)):
        raise PlanError(
            f"{part.host} has a training in {part.directory} already: go on with it (--resume), or choose another "
            "run=NAME"
        )
    return Found(checkpoints=checkpoints, events=events)


def origin_of(directory: Path, resume: str, leads: Found) -> Origin:
    """The checkpoint that `--resume` names, or the newest of that training, here or there. Raises DataError."""
    named = directory if resume == "latest" else Path(resume).expanduser().resolve()
    own = {directory.resolve(), (directory / CHECKPOINTS).resolve()}
    if is_name(named.name, TRAINING):
        if named.is_dir():
            return Origin(name=named.name, here=named)
        if named.parent in own and named.name in leads.checkpoints:
            return Origin(name=named.name, here=None)
        raise DataError(f"--resume {resume}: there is no such checkpoint, here or on the host")
    here = {p.name: p for p in numbered(named, TRAINING) or numbered(named / CHECKPOINTS, TRAINING)}
    names = {*here, *(leads.checkpoints if named.resolve() in own else ())}
    if not names:
        raise DataError(
            f"--resume {resume}: there is no checkpoint to go on from, here or on the host; leave --resume out to "
            "begin anew"
        )
    newest = max(names, key=lambda name: number_of(Path(name)))
    return Origin(name=newest, here=here.get(newest))


def check_plan(directory: Path, origin: Origin, plan: Plan) -> None:
    """Raises Refused for a checkpoint of another plan, before anything is sent or written; of one that only the host
    has, what was kept here of its training tells.
    """
    if origin.here is not None:
        check_plan_of(origin.here, plan)
    elif (kept := kept_plan(directory)) is not None:
        check_made_with(directory / CHECKPOINTS / origin.name, plan_hash(kept), plan)


async def send_origin(
    there: Agent, facts: Facts, origin: Origin, found: Found, run: str, tell: Callable[[str], None]
) -> None:
    """The checkpoint, to a host without it: whole or not there. Raises PlanError, DataError, StorageError."""
    host = facts.host.host_name
    if origin.here is None:
        if origin.name not in found.checkpoints:
            raise DataError(
                f"{origin.name} is neither here nor on {host}: fetch it first, with `manyhands hosts fetch`"
            )
        return
    files = {f.relative_to(origin.here).as_posix(): f for f in origin.here.rglob("*") if f.is_file()}
    has = found.checkpoints.get(origin.name)
    if has is not None:
        if has != {name: file.stat().st_size for name, file in files.items()}:
            raise PlanError(
                f"{host} has another {origin.name} in {run} than {origin.here}: remove it there, or choose another "
                "run=NAME"
            )
        return
    tell(f"sending {origin.here}")
    aside = f"{run}/{CHECKPOINTS}/.{origin.name}.sent"
    for name, file in sorted(files.items()):
        await send_file(there, file, f"{aside}/{name}")
    done = await there.ask(
        "run", command=[facts.python, "-c", _RENAME, aside, f"{run}/{CHECKPOINTS}/{origin.name}"]
    )
    if done["code"]:
        raise StorageError(f"{host}: {aside} could not be given its name: {done['output'].strip()[-300:]}")


async def send_events(there: Agent, part: Part, directory: Path, found: Found) -> None:
    """The events so far, to a host that has fewer: it goes on behind them. Raises PlanError where it has others."""
    file = directory / EVENTS
    if not file.is_file():
        return
    whole = file.read_bytes().rfind(b"\n") + 1
    if not whole:
        return
    if found.events < whole:
        await send_file(there, file, f"{part.directory}/{EVENTS}")
        return
    answer = await there.ask("hashes", path=f"{part.directory}/{EVENTS}", bytes=whole)
    if answer["hashes"] != hashes_of(file, whole):
        raise PlanError(
            f"{part.host} has another training in {part.directory} than {directory}: choose another run=NAME"
        )


async def leave_newer_there(there: Agent, origin: Origin, part: Part, tell: Callable[[str], None]) -> None:
    """What is behind it there, once it is sure that it can be gone on from: nothing of it may come back here."""
    answer = await there.ask("leave", run=part.directory, number=number_of(Path(origin.name)))
    if answer["left"]:
        tell(f"{part.host}: set aside, into checkpoints/aside: {', '.join(answer['left'])}")


def leave_newer(directory: Path, origin: Origin) -> None:
    """What is behind it here: of a course that is left. Raises StorageError."""
    try:
        trainings.leave_newer(str(directory), number_of(Path(origin.name)))
    except OSError as error:
        raise StorageError(f"{error}; move it elsewhere by hand") from error
