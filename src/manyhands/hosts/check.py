"""What a person is told of a host before anything runs there: a line for each question, with what to do."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final, Literal

from manyhands import __version__
from manyhands.config.extras import EXTRAS
from manyhands.errors import ManyhandsError, WorkerError
from manyhands.hosts.agent import agent
from manyhands.hosts.connection import Connection, connected, is_here
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.launch import LEAST_FREE_BYTES, Facts, check_devices, look, setup_with

OLDEST_PYTHON: Final = (3, 11)
NEWEST_PYTHON: Final = (3, 13)
_SKEW_S: Final = 5.0
State = Literal["ok", "note", "fault"]
_PACKAGES: Final = [module for modules in EXTRAS.values() for module in modules]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """`state`: fault, if nothing can run there before it is mended; note, if a person should know it."""

    host: str
    what: str
    state: State
    found: str
    to_do: str = ""


async def check(host: Host) -> list[Check]:
    """All of them; after one that makes the others pointless, none of those."""
    say = _Say(host)
    begun = time.monotonic()
    try:
        async with connected(host) as connection:
            took_ms = (time.monotonic() - begun) * 1000
            how = "this machine, by a shell" if is_here(host) else f"by SSH, in {took_ms:.0f} ms"
            say.ok("connection", how)
            inside = await _inside(connection, host)
            contained = isinstance(inside, Facts) and inside.manyhands == __version__
            try:
                async with agent(connection, host) as there:
                    asked = time.time()
                    facts = await look(there, host, packages=_PACKAGES, gpus=True)
                    skew_s = facts.raw["time"] - (asked + time.time()) / 2
                _facts(say, facts, skew_s, contained)
            except WorkerError as error:
                _unless(contained, say, "python", str(error), "" if inside is None else "see docker")
            if inside is not None:
                _docker(say, host, inside)
    except ManyhandsError as error:
        said = str(error).removeprefix(f"{host.host_name}: ")
        found, _, to_do = said.partition("; " if "; " in said else ": ")
        say.fault("connection", found, to_do)
    return say.said


async def _inside(connection: Connection, host: Host) -> Facts | ManyhandsError | None:
    """Of the host's container, or why they are not to be had; None for a host without one."""
    if host.docker_launch_command is None:
        return None
    try:
        async with agent(connection, host, docker=True) as there:
            return await look(there, host, packages=_PACKAGES, gpus=True)
    except ManyhandsError as error:
        return error


class _Say:
    """Collects the answers of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host.host_name
        self.said: list[Check] = []

    def ok(self, what: str, found: str) -> None:
        self._say(what, "ok", found)

    def note(self, what: str, found: str, to_do: str = "") -> None:
        self._say(what, "note", found, to_do)

    def fault(self, what: str, found: str, to_do: str) -> None:
        self._say(what, "fault", found, to_do)

    def _say(self, what: str, state: State, found: str, to_do: str = "") -> None:
        one_line = " ".join(found.split())
        self.said.append(Check(host=self._host, what=what, state=state, found=one_line, to_do=to_do))


def _unless(contained: bool, say: _Say, what: str, found: str, to_do: str) -> None:
    """A fault, unless the host's container has what it lacks: it trains there then."""
    if contained:
        say.note(what, f"{found}: it trains in its container", to_do)
    else:
        say.fault(what, found, to_do)


def _facts(say: _Say, facts: Facts, skew_s: float, contained: bool) -> None:
    name, raw = facts.host.host_name, facts.raw
    version = tuple(raw["python"])
    shown = f"{'.'.join(map(str, version))} at {facts.python}"
    if OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        say.ok("python", shown)
    else:
        to_do = f'3.11 to 3.13 are supported: install one, and name it in "Python" for {name}'
        _unless(contained, say, "python", shown, to_do)
    setup = f"manyhands hosts setup {name}"
    if facts.host.python is not None:
        setup += ', and then leave "Python" out of its entry: it has made one of its own'
    if facts.manyhands is None:
        _unless(contained, say, "manyhands", "not installed", setup)
    elif facts.manyhands != __version__:
        _unless(contained, say, "manyhands", f"{facts.manyhands}, here it is {__version__}", setup)
    elif raw["torch"] is None:
        _unless(contained, say, "manyhands", f"{facts.manyhands}, and torch is missing", setup)
    else:
        say.ok("manyhands", f"{facts.manyhands}, torch {raw['torch']}")
        _extras(say, facts, setup_with(name, ["onnx"]).strip("`"))
    _gpus(say, facts)
    free = f"{facts.free_bytes / 2**30:,.1f} GiB free at {raw['work']}"
    if not raw["writable"]:
        say.fault(
            "disk", f"{raw['work']} cannot be written", "choose another WorkDir, or let yourself write there"
        )
    elif facts.free_bytes < LEAST_FREE_BYTES:
        say.fault("disk", free, "free space there, or choose another WorkDir")
    else:
        say.ok("disk", free)
    if abs(skew_s) > _SKEW_S:
        say.note(
            "clock", f"{skew_s:+.0f} s from here", "set it there, by NTP: times in tables are the host's"
        )
    else:
        say.ok("clock", f"{skew_s:+.1f} s from here")
    _mount(say, facts)
    if facts.host.docker_launch_command is None:
        program = raw["docker"]
        say.ok(
            "docker",
            f"not used: no DockerLaunchCommand ({f'{program} is there' if program else 'none there'})",
        )


def _extras(say: _Say, facts: Facts, to_do: str, where: str = "") -> None:
    """A plan that needs one that is missing is refused when it is to begin; without onnx nothing is exported."""
    there = [
        extra for extra, modules in EXTRAS.items() if all(facts.raw["packages"][name] for name in modules)
    ]
    shown = ", ".join(there) or "none"
    if "onnx" in there:
        say.ok(f"{where}extras", shown)
    else:
        say.note(f"{where}extras", f"{shown}: without onnx checkpoints are not exported there", to_do)


def _gpus(say: _Say, facts: Facts, where: str = "") -> None:
    what = f"{where}gpus"
    if facts.gpus is None:
        say.note(what, "nvidia-smi does not answer", "see what it says there: the driver may be broken")
        return
    shown = ", ".join(f"{i} {gpu['name']} {gpu['memory'] / 1024:.0f} GiB" for i, gpu in enumerate(facts.gpus))
    try:
        check_devices(facts, facts.host.devices)
        if facts.gpus:
            say.ok(what, shown)
        else:
            say.note(what, f"none; {facts.raw['cpus']} CPUs", "")
    except ManyhandsError as error:
        say.fault(what, shown or "none", str(error))


def _mount(say: _Say, facts: Facts) -> None:
    path = facts.host.path_to_output_from_host
    if path is None:
        say.ok("mount", "none: results come back over the connection")
    elif facts.outputs == "shared":
        say.ok("mount", f"{path} is MANYHANDS_HOME of this machine: nothing has to be sent back")
    elif facts.outputs == "read-only":
        say.note("mount", f"{path} is read-only there", "mount it so that it can be written, or leave it out")
    else:
        found = "is not there" if facts.outputs == "missing" else "is not MANYHANDS_HOME of this machine"
        say.note(
            "mount", f"{path} {found}", "nothing, if results may come back over the connection; else mount it"
        )


def _docker(say: _Say, host: Host, inside: Facts | ManyhandsError) -> None:
    command = str(host.docker_launch_command)
    if isinstance(inside, ManyhandsError):
        say.fault("docker", str(inside), "start the container there, or mend DockerLaunchCommand")
        return
    if inside.manyhands != __version__:
        found = "no manyhands" if inside.manyhands is None else f"manyhands {inside.manyhands}"
        say.fault("docker", f"{command}: {found}", f"install {__version__} in the container")
        return
    if inside.raw["torch"] is None:
        say.fault("docker", f"{command}: torch is missing", "install torch in the container")
        return
    say.ok("docker", f"{command}: manyhands {inside.manyhands}, torch {inside.raw['torch']}")
    _extras(say, inside, "install the packages of manyhands[onnx] in the container", "docker ")
    _gpus(say, inside, "docker ")
