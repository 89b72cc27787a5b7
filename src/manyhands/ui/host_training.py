"""`manyhands train --host` and `hosts attach`: a training on other machines, seen as if it were here."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import click

from manyhands.hosts.record import Record
from manyhands.hosts.watching import Outcome, as_asked, watch, words_of
from manyhands.ui.attending import attended, detached, stop_all
from manyhands.ui.live_training import TrainScreen, in_the_end
from manyhands.ui.terminal import human_bytes, human_seconds, printable, printable_lines

if TYPE_CHECKING:
    from manyhands.hosts.beginning import Wish
    from manyhands.hosts.hosts_file import Host

REFRESH_PER_S: Final = 0.5  # every redrawing costs, and a training may take days


class HostScreen:
    """A training's screen, which lines of its hosts and of the connection come to as well."""

    def __init__(self, logs: str, name: str, samples_per_step: int) -> None:
        self._logs = logs
        self._ends: dict[str, dict[str, Any]] = {}  # how it started and finished
        self.screen = TrainScreen(logs, name, samples_per_step=samples_per_step, refresh_per_s=REFRESH_PER_S)

    def __enter__(self) -> Self:
        self.screen.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        self.screen.close()

    def event(self, event: dict[str, Any]) -> None:
        if event["kind"] in ("started", "finished"):
            self._ends[event["kind"]] = event
        self.screen.show(event)

    def in_the_end(self) -> str:
        """What it has come to; nothing of one that has not finished, or says something else."""
        try:
            end = self._ends["finished"]
            losses = (float(end["validation_loss_before"]), float(end["validation_loss_after"]))
            per_s = end["tokens"] / end["seconds"] if end["seconds"] else 0.0
            return in_the_end(*losses, end["step"], per_s, printable(self._ends["started"]["unit"]))
        except (LookupError, TypeError, ValueError):
            return ""

    def line(self, host: str, text: str) -> None:
        self.tell(f"{host}: {text}")

    def tell(self, text: str) -> None:
        if self._logs == "json":
            self.event({"kind": "host", "text": text})
        elif self._logs != "none":
            self.screen.line(printable(text))


# ---------------------------------------------------------------------------------------- train --host
def train_on_hosts(hosts: Sequence[Host], wish: Wish, logs: str) -> int:
    """Start it there and watch it; the exit code. Raises what `begin` and `watch` do; Interrupted when detached."""
    from manyhands.hosts.beginning import begin  # who only follows needs none of it

    async def carry_out() -> int:
        names = ", ".join(host.host_name for host in hosts)
        samples_per_step = wish.configuration.plan.local.batch_size
        with HostScreen(logs, f"{wish.run} on {names}", samples_per_step) as screen:
            screen.tell(f"looking at {names}")
            record = await begin(hosts, wish, screen)
            return await _attended(wish.directory, record, screen, logs, replay=False)

    return asyncio.run(carry_out())


def attach(directory: Path, record: Record, logs: str) -> int:
    """Watch a training that was started before, also from another terminal; the exit code."""

    async def carry_out() -> int:
        name = f"{record.run} on {', '.join(part.host for part in record.parts)}"
        with HostScreen(logs, name, record.samples_per_step) as screen:
            return await _attended(directory, record, screen, logs, replay=True)

    return asyncio.run(carry_out())


async def _attended(directory: Path, record: Record, screen: HostScreen, logs: str, *, replay: bool) -> int:
    """Watch, and listen to the person in front of it."""
    watching = asyncio.create_task(watch(directory, record, screen, replay=replay))
    left = await attended(watching, screen.screen, lambda: stop_all([record], screen.tell))
    if left is not None:
        return detached([record], left)
    outcome = watching.result()
    screen.screen.close()
    for host, ending in outcome.endings.items():
        if ending.get("exit_code") != 0:
            click.echo(ended(host, ending), err=True)
    if logs not in ("json", "none"):
        if text := screen.in_the_end():
            click.echo(text)
        _tell_what_came(directory, outcome)
    return outcome.exit_code


def ended(host: str, ending: dict[str, Any], name: str = "") -> str:
    """What a person is told of a training that has not finished; what nobody has asked for is an error."""
    words = f"{name and name + ': '}{printable_lines(words_of(host, ending))}"
    return words if as_asked(ending) else f"error: {words}"


def _tell_what_came(directory: Path, outcome: Outcome) -> None:
    if outcome.fetched.bytes:
        click.echo(
            f"fetched {human_bytes(outcome.fetched.bytes)} in {human_seconds(outcome.fetched.seconds)} to {directory}"
        )
    latest = directory / "checkpoints" / "latest"
    if latest.is_file():
        click.echo(f"checkpoint {directory / 'checkpoints' / latest.read_text(encoding='utf-8').strip()}")
        if outcome.exit_code != 0:
            click.echo(f"go on with: manyhands train --host={','.join(outcome.endings)} --resume {directory}")
            graph = directory / "exports" / f"{latest.read_text(encoding='utf-8').strip()}.onnx"
            if graph.parent.is_dir() and not graph.is_file():
                click.echo(
                    f"its graph comes when it goes on, or here: manyhands export {directory} --to onnx"
                )
