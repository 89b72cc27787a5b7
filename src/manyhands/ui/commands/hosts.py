"""`manyhands hosts`: the machines of the hosts' file, and the trainings that were started on them from here."""

from __future__ import annotations

import asyncio
import textwrap
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyhands.ui.command_line import Command, Entry, LazyGroup, format_option

if TYPE_CHECKING:
    from manyhands.hosts.hosts_file import Host
    from manyhands.hosts.record import Part, Record

_HERE = "manyhands.ui.commands.hosts"
hosts = LazyGroup(
    "hosts",
    {
        "ls": Entry(f"{_HERE}:ls", "List the hosts, and the trainings on them that were started from here."),
        "check": Entry(f"{_HERE}:check", "See whether a host can be trained on, and what to do if not."),
        "setup": Entry(f"{_HERE}:setup", "Install this version of manyhands on a host, without root."),
        "attach": Entry(f"{_HERE}:attach", "See a training on a host again, and bring back what it makes."),
        "logs": Entry(f"{_HERE}:logs", "What a training printed on its hosts."),
        "fetch": Entry(f"{_HERE}:fetch", "Bring back what a training on a host has made so far."),
        "stop": Entry(f"{_HERE}:stop", "Ask a training on a host to save and end."),
    },
    help="Other machines to train on, over SSH: those of hosts.json in MANYHANDS_HOME.",
)

ASK_S = 8.0
"""How long `ls` waits for a host."""

run_argument = click.argument("run", metavar="RUN")


@click.command("ls", cls=Command)
@format_option
def ls(output: str) -> None:
    """List the hosts, and the trainings on them that were started from here; those that go on are asked for."""
    from manyhands.hosts.hosts_file import hosts as known
    from manyhands.hosts.record import all_recorded
    from manyhands.ui.terminal import print_json, table

    hosts_rows = [_host_row(host) for host in known().values()]
    runs = list(all_recorded(tell=_tell).items())
    states = asyncio.run(_states([record for _, record in runs]))
    run_rows = [
        _run_row(directory, record, part, states) for directory, record in runs for part in record.parts
    ]
    if output == "json":
        print_json({"hosts": hosts_rows, "runs": run_rows})
        return
    if not hosts_rows:
        from manyhands.config import home

        click.echo(f"no hosts yet: name them in {home() / 'hosts.json'} (docs/hosts.md)")
        return
    click.echo(table(hosts_rows, _HOST_COLUMNS))
    if run_rows:
        click.echo("\n" + table(run_rows, _RUN_COLUMNS))


_HOST_COLUMNS = {
    "host": "host",
    "user": "user",
    "directory": "directory",
    "devices": "GPUs",
    "docker": "docker",
}
_RUN_COLUMNS = {
    "run": "run",
    "host": "host",
    "state": "state",
    "step": "step",
    "fetched": "fetched",
    "directory": "here",
}


def _host_row(host: Host) -> dict[str, Any]:
    return {
        "host": host.host_name,
        "user": host.user_name,
        "directory": host.work_dir,
        "devices": None if host.devices is None else ",".join(map(str, host.devices)),
        "docker": host.docker_launch_command,
    }


def _run_row(
    directory: Path, record: Record, part: Part, states: dict[tuple[str, str], str]
) -> dict[str, Any]:
    return {
        "run": record.run,
        "host": part.host,
        "state": states[record.run, part.host],
        "step": _last_step(directory / "events.jsonl"),
        "fetched": record.fetched,
        "directory": str(directory),
    }


async def _states(records: list[Record]) -> dict[tuple[str, str], str]:
    """Of each run and host: from its record if it has ended, else from the host."""
    asked = [(record, part) for record in records for part in record.parts]
    found = await asyncio.gather(*(_state(part) for record, part in asked))
    return {(record.run, part.host): state for (record, part), state in zip(asked, found, strict=True)}


async def _state(part: Part) -> str:
    from manyhands.errors import ManyhandsError
    from manyhands.hosts.watching import as_asked, state_of

    ending = part.ending
    if ending is None:
        try:
            ending = await state_of(part, within_s=ASK_S)
        except ManyhandsError as error:
            return f"unknown: {str(error).splitlines()[0][:60]}"
    if ending is None:
        return "never started"
    if ending["state"] == "ended":
        code = ending["exit_code"]
        return "stopped" if as_asked(ending) else "finished" if code == 0 else f"failed with {code}"
    return str(ending.get("phase") if ending["state"] == "running" else ending["state"])


def _last_step(events: Path) -> int | None:
    """Of the copy here, by its end."""
    import json

    if not events.is_file():
        return None
    with events.open("rb") as file:
        file.seek(max(0, events.stat().st_size - 65_536))
        for line in reversed(file.read().splitlines()):
            if b'"step"' in line:
                try:
                    return int(json.loads(line)["step"])
                except (ValueError, KeyError):
                    continue
    return None


@click.command("check", cls=Command)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@format_option
def check(names: tuple[str, ...], output: str) -> None:
    """See whether hosts (all of them, if none is named) can be trained on, and what to do where not.

    Ends with code 12 if there is a fault.
    """
    from manyhands.errors import WorkerError
    from manyhands.hosts.check import check as check_host
    from manyhands.hosts.hosts_file import chosen
    from manyhands.hosts.hosts_file import hosts as known
    from manyhands.ui.terminal import print_json, terminal_width

    wanted = chosen(names) if names else list(known().values())
    if not wanted:
        raise click.UsageError(
            "there are no hosts yet: name them in hosts.json of MANYHANDS_HOME (docs/hosts.md)"
        )

    async def all_of_them() -> list[dict[str, Any]]:
        found = await asyncio.gather(*(check_host(host) for host in wanted))
        return [
            {f: getattr(c, f) for f in ("host", "what", "state", "found", "to_do")}
            for cs in found
            for c in cs
        ]

    rows = asyncio.run(all_of_them())
    if output == "json":
        print_json(rows)
    else:
        click.echo("\n".join(_check_lines(rows, terminal_width())))
    if any(row["state"] == "fault" for row in rows):
        raise click.exceptions.Exit(WorkerError.exit_code)


def _check_lines(rows: Sequence[Mapping[str, str]], width: int | None) -> list[str]:
    """What was found, and below it what to do; a width of None is no limit, for a pipe."""
    from manyhands.ui.terminal import printable

    widths = {key: max(len(row[key]) for row in rows) for key in ("host", "what", "state")}
    lines = []
    for row in rows:
        head = "  ".join(row[key].ljust(size) for key, size in widths.items()) + "  "
        room = 10_000 if width is None else max(30, width - len(head))
        said = textwrap.wrap(printable(row["found"]), room, break_long_words=False, break_on_hyphens=False)
        if row["to_do"]:
            arrow = "→ "
            said += textwrap.wrap(
                arrow + printable(row["to_do"]), room, subsequent_indent=" " * len(arrow),
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
        lines += [(head if i == 0 else " " * len(head)) + text for i, text in enumerate(said or [""])]
    return [line.rstrip() for line in lines]


@click.command("setup", cls=Command)
@click.argument("name", metavar="NAME")
@click.option(
    "--wheel",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="A wheel of manyhands.  [default: made of what runs here]",
)
@click.option(
    "--extras",
    metavar="onnx,chess",
    default="onnx",
    show_default=True,
    help="Optional parts to install as well; '' for none.",
)
@click.option("--system-packages", is_flag=True, help="Use what the host's Python has installed, as torch.")
@click.option("--no-dependencies", is_flag=True, help="Install nothing else: no network is needed there.")
def setup(name: str, wheel: Path | None, extras: str, system_packages: bool, no_dependencies: bool) -> None:
    """Install this version of manyhands on a host: into an environment of its own in WorkDir, without root."""
    import tempfile

    from manyhands.config import did_you_mean
    from manyhands.config.extras import EXTRAS
    from manyhands.hosts.hosts_file import host_named
    from manyhands.hosts.setup import own_wheel
    from manyhands.hosts.setup import setup as set_up
    from manyhands.ui.terminal import printable_lines

    host = host_named(name)
    wanted = [extra for extra in extras.split(",") if extra]
    if unknown := sorted({*wanted} - {*EXTRAS}):
        raise click.UsageError(
            f"--extras: there is no part {unknown[0]!r}.{did_you_mean(unknown[0], EXTRAS)}"
        )
    with tempfile.TemporaryDirectory(prefix="manyhands-wheel-") as directory:
        made = asyncio.run(
            set_up(
                host,
                wheel or own_wheel(Path(directory)),
                system_packages=system_packages,
                dependencies=not no_dependencies,
                extras=wanted,
                tell=_tell,
            )
        )
    click.echo(printable_lines(f"{name} has manyhands {made.version} at {made.python}"))
    if host.python is not None:
        click.echo(f'its entry names "Python": {host.python}: take that out to use the new one', err=True)


@click.command("attach", cls=Command)
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--logs",
    type=click.Choice(["tui", "console", "json", "none"]),
    help="What to show.  [default: tui on a terminal, else console]",
)
def attach(runs: tuple[str, ...], logs: str | None) -> None:
    """See a training on a host again, from where its events are here, and bring back what it makes.

    Several, as of one command with --multirun, share one table. Ends as the training does, or as the first of them
    that failed. RUN is its name, or its directory here.
    """
    from manyhands.hosts.record import run_named
    from manyhands.ui.host_training import attach as watch
    from manyhands.ui.live import choose_logs

    found = [run_named(run) for run in runs]
    if len(found) == 1:
        code = watch(*found[0], choose_logs(logs))
    else:
        from manyhands.ui.host_sweep import attach_all

        code = attach_all(found, choose_logs(logs))
    if code:
        raise click.exceptions.Exit(code)


@click.command("logs", cls=Command)
@run_argument
@click.option(
    "--lines", metavar="N", type=click.IntRange(min=1), default=100, show_default=True, help="From the end."
)
def logs(run: str, lines: int) -> None:
    """What a training printed on its hosts, as it is there now; from the copy here where a host cannot be reached."""
    from manyhands.hosts.record import run_named
    from manyhands.ui.terminal import printable

    directory, record = run_named(run)
    for part in record.parts:
        text = _run(_log(directory, part))
        if len(record.parts) > 1:
            click.echo(f"── {part.host}")
        for line in text.splitlines()[-lines:]:
            click.echo(printable(line))


async def _log(directory: Path, part: Part) -> str:
    from manyhands.errors import ServerUnreachable
    from manyhands.hosts.agent import reached
    from manyhands.hosts.follow import LOG
    from manyhands.hosts.hosts_file import host_named

    here = directory / "logs" / f"{part.host}.log"
    try:
        async with reached(host_named(part.host), docker=part.docker) as there:
            return str((await there.ask("text", path=f"{part.directory}/{LOG}", bytes=4 << 20))["text"])
    except ServerUnreachable as error:
        if not here.is_file():
            raise
        _tell(f"{error}; this is the copy here")
        return here.read_text(encoding="utf-8", errors="replace")


@click.command("fetch", cls=Command)
@run_argument
@click.option("--all", "everything", is_flag=True, help="Also what it was given: materials, inputs, code.")
def fetch(run: str, everything: bool) -> None:
    """Bring back what a training on a host has made so far; goes on where an earlier attempt was cut off.

    With --all also the prepared data, which `manyhands eval` needs.
    """
    from manyhands.hosts.fetch import fetch as bring
    from manyhands.hosts.hosts_file import host_named
    from manyhands.hosts.record import run_named
    from manyhands.ui.terminal import human_bytes, human_seconds

    directory, record = run_named(run)
    part = record.parts[0]
    if record.shared:
        click.echo(f"{part.host} writes into {directory} itself: everything is here")
        return
    found = _run(
        bring(
            host_named(part.host),
            part.directory,
            directory,
            docker=part.docker,
            everything=everything,
            tell=_tell,
            keep=record.keep,
        )
    )
    kept = f", {human_bytes(found.kept_bytes)} were here" if found.kept_bytes else ""
    rate = f" ({human_bytes(found.bytes / found.seconds)}/s)" if found.bytes > 1 << 20 else ""
    click.echo(
        f"fetched {human_bytes(found.bytes)} in {found.files} files{kept}, {human_seconds(found.seconds)}{rate}, to "
        f"{directory}"
    )


@click.command("stop", cls=Command)
@run_argument
@click.option("--now", is_flag=True, help="End it at once, without saving.")
def stop(run: str, now: bool) -> None:
    """Ask a training on a host to save and end. `hosts attach` shows how it does, and brings back what it saved.

    Of several hosts all are asked, also where one cannot be reached.
    """
    from manyhands.errors import ManyhandsError
    from manyhands.hosts.record import run_named
    from manyhands.hosts.watching import stop as ask
    from manyhands.hosts.watching import stop_in_words

    _, record = run_named(run)
    faults: list[ManyhandsError] = []
    for part in record.parts:
        try:
            status = _run(ask(part, now=now))
        except ManyhandsError as error:
            faults.append(error)
            continue
        click.echo(f"{run} on {part.host} {stop_in_words(status, now=now)}")
    for fault in faults[1:]:
        _tell(f"error: {fault}")
    if faults:
        raise faults[0]


def _tell(text: str) -> None:
    """On standard error; what a host has said cannot steer the terminal."""
    from manyhands.ui.terminal import printable_lines

    click.echo(printable_lines(text), err=True)


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)
