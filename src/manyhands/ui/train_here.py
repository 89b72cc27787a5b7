"""From the command line of `manyhands train` to a training on this machine, with one process or many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from manyhands.errors import Interrupted, ManyhandsError
from manyhands.ui.command_line import debug_asked

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration
    from manyhands.engine.launch import Nodes
    from manyhands.engine.run import TrainResult


class Here:
    """One training, from its configuration to its last line."""

    def __init__(
        self, configuration: Configuration, directory: Path | None, allowed: Sequence[str], logs: str | None
    ) -> None:
        from manyhands.ui.plans import training_directory

        self._configuration, self._allowed, self._logs = configuration, allowed, logs
        self._directory = training_directory(configuration, directory)
        from manyhands.engine.refusal import refusal_in

        self._earlier = refusal_in(self._directory)

    def train(self, devices: str | None, *, started: bool) -> None:
        """Here, or in processes of its own when several are asked for."""
        start = self._configuration.start
        indexes = devices_of(devices)
        processes = self._configuration.processes(indexes, start.nodes or 1)
        several = processes > 1 or indexes is not None or start.nodes is not None
        if started and start.processes is None and start.nodes is None:
            self._here()
            return
        with self._telling_why():
            self._check(processes)
        if not several:
            self._here()
            return
        self._configuration.keep(self._directory)
        from manyhands.engine.launch import Nodes, choose_devices, launch

        if indexes is not None:
            choose_devices(indexes)
        code = launch(
            self._command(),
            processes,
            restarts=self._configuration.settings.exec.restarts,
            again=["--resume", "latest"],
            tell=self._tell,
            among=self._among(Nodes),
        )
        if code:
            raise click.exceptions.Exit(code)

    def _tell(self, text: str) -> None:
        """What the one says that starts the processes, none of which runs now; who follows the events hears of it."""
        from manyhands.engine.events import Events

        click.echo(text, err=True)
        with Events(self._directory / "events.jsonl") as events:
            events.emit("warning", text=text)

    def _among(self, nodes: type[Nodes]) -> Nodes | None:
        """This machine among those that start their processes for this training."""
        start = self._configuration.start
        if start.nodes is None or start.node_rank is None:
            return None
        assert start.master_addr is not None  # Start sees to it
        assert start.master_port is not None
        return nodes(
            count=start.nodes,
            rank=start.node_rank,
            address=start.master_addr,
            port=start.master_port,
            wait_s=round(self._configuration.settings.exec.wait_for_ranks_s),
        )

    def _rank(self) -> int:
        """Given, else of torchrun's, else 0."""
        rank = self._configuration.start.rank
        return rank if rank is not None else self._place().rank

    def _check(self, processes: int) -> None:
        """Before processes are started, or a task of one's own is tried in a process of its own: it leaves its
        materials.
        """
        from manyhands.plan.tasks import CustomTask

        configuration, task = self._configuration, self._configuration.plan.task
        own = isinstance(task, CustomTask) and task.target in self._allowed
        nodes, node_rank = self._configuration.start.nodes or 1, self._configuration.start.node_rank or 0
        if not own and processes == nodes == 1:
            return
        from manyhands.engine.faults import check_trainable
        from manyhands.engine.world import Place

        world_size = processes * nodes
        place = self._place() if world_size == 1 else Place(rank=node_rank * processes, world_size=world_size)
        check_trainable(configuration.plan, place, self._directory, self._resume(), configuration.settings)
        if not isinstance(task, CustomTask) or not own or not place.leads:
            return
        from manyhands.engine.materials import prepared_mark
        from manyhands.engine.task_check import check_in_process
        from manyhands.plan.resolve import plan_hash

        materials = self._directory / "materials"
        if not prepared_mark(materials, plan_hash(self._configuration.plan)).is_file():
            check_in_process(self._configuration.plan, materials, task.target)

    @contextmanager
    def _telling_why(self) -> Iterator[None]:
        """Before the ranks have met: why this one does not come is told to those that wait for it."""
        start = self._configuration.start
        try:
            yield
        except ManyhandsError as error:
            if start.rank is not None and start.master_addr is None:
                from manyhands.engine.refusal import leave_refusal

                leave_refusal(self._directory, start.rank, str(error))
            raise

    def _command(self) -> list[str]:
        command = ["-m", "manyhands", "train", "--kept", "--directory", str(self._directory)]
        for target in self._allowed:
            command += ["--allow-task", target]
        if self._logs is not None:
            command += ["--logs", self._logs]
        if self._configuration.start.resume is not None:
            command += ["--resume", self._configuration.start.resume]
        return [*command, "--debug"] if debug_asked() else command

    def _here(self) -> None:
        from manyhands.ui.live import choose_logs
        from manyhands.ui.live_training import TrainScreen

        configuration, leads = self._configuration, self._rank() == 0
        logs = choose_logs(self._logs) if leads else "none"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            from manyhands.engine.stopping import end_with_parent

            end_with_parent()
        samples_per_step = configuration.plan.local.batch_size
        with TrainScreen(logs, configuration.plan.name, samples_per_step=samples_per_step) as screen:
            screen.show({"kind": "loading", "text": "loading torch"})
            from manyhands.engine.faults import check_trainable
            from manyhands.engine.run import train as run
            from manyhands.plan.needs import check_installed

            with self._telling_why():
                place, resume = self._place(), self._resume()
                check_installed(configuration.packages())
                check_trainable(configuration.plan, place, self._directory, resume, configuration.settings)
            if leads:
                configuration.keep(self._directory)
                if logs in ("console", "tui"):
                    screen.line(f"writing to {self._directory}")
                if resume is None and configuration.start.resume == "latest":
                    text = f"resume=latest: no checkpoint in {self._directory} yet, so it begins at step 0"
                    screen.show({"kind": "warning", "text": text})
            result = run(
                configuration.plan,
                self._directory,
                settings=configuration.settings,
                resume=resume,
                place=place,
                on_event=screen.show,
                on_stop=screen.line if logs == "tui" else None,
                allowed_tasks=self._allowed,
            )
        if logs not in ("json", "none"):
            _print(result)

    def _place(self) -> Any:
        from manyhands.engine.world import Place, place_from, this_machine

        start = self._configuration.start
        if start.rank is None or start.world_size is None:
            return place_from(os.environ)
        rank, world_size = start.rank, start.world_size

        def meet() -> Any:
            from manyhands.engine.rendezvous import meet

            return meet(
                self._directory,
                rank,
                world_size,
                wait_s=self._configuration.settings.exec.wait_for_ranks_s,
                address=start.master_addr,
                port=start.master_port,
                earlier=self._earlier,
            )

        return Place(rank=rank, world_size=world_size, meet=meet, machine=this_machine())

    def _resume(self) -> Path | None:
        resume = self._configuration.start.resume
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if resume == "latest" or again:
            from manyhands.engine.kept_checkpoints import checkpoints

            if checkpoints(self._directory / "checkpoints"):
                return self._directory
        return Path(resume) if resume not in (None, "latest") else None


def _print(result: TrainResult) -> None:
    from manyhands.ui.live_training import in_the_end

    losses = (result.validation_loss_before, result.validation_loss_after)
    click.echo(in_the_end(*losses, result.steps, result.tokens_per_s, result.unit))
    click.echo(f"checkpoint {result.checkpoint}")


def sweep_here(
    compose: Callable[[Sequence[str]], Configuration], overrides: Sequence[str], directory: Path | None
) -> None:
    """Each combination in a process of its own, one after the other, as this command line without --multirun.

    All are composed before the first begins. Below `directory`, where one is given, each has its own, by its number.
    """
    from manyhands.plan.compose import sweep

    combinations = sweep(overrides)
    configurations = [compose(combination) for combination in combinations]
    _check_apart(configurations, directory)
    told_apart = directory is not None or len({one.name() for one in configurations}) == len(configurations)
    given = {*overrides, "--multirun", "-m", f"--directory={directory}"}
    others = [word for word in sys.argv[1:] if word not in given]
    if "--directory" in others:
        at = others.index("--directory")
        del others[at : at + 2]
    for number, combination in enumerate(combinations, start=1):
        swept = " ".join(word for word in combination if word not in overrides)
        which = f"[{number}/{len(combinations)}] {swept}"
        click.echo(which, err=True)
        place = [] if directory is None else ["--directory", str(directory / str(number))]
        code, asked = _carried_out([sys.executable, "-m", "manyhands", *others, *place, *combination])
        if asked and number < len(combinations):
            code = code or Interrupted.exit_code  # it was just finishing: the next is not begun
        if code:
            raise click.exceptions.Exit(_told_of(which, code, goes_on=told_apart))


def _told_of(which: str, code: int, *, goes_on: bool) -> int:
    """Say how a training of a sweep has ended, and with it the sweep."""
    ends = {Interrupted.exit_code: "was interrupted", 128 + signal.SIGKILL: "was killed by SIGKILL"}
    text = f"{which} {ends.get(code, f'ended with exit code {code}')}"
    if goes_on:
        mended = "" if code in ends else "mend that, and "
        text += f"; {mended}the same command with resume=latest goes on"
    click.echo(text, err=True)
    return code


def _carried_out(command: Sequence[str]) -> tuple[int, bool]:
    """Run a training, which saves and ends where this process is asked to. Its exit code, 128 + n for signal n, and
    whether this process was asked.

    It has a session of its own: what a terminal, a service manager or `timeout` sends to all would come to it twice,
    and the second has it leave at once.
    """
    asked: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {n: signal.signal(n, pass_on) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        process = subprocess.Popen(command, start_new_session=True)
        if asked:  # before there was anybody to pass it on to
            process.send_signal(asked[0])
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code, bool(asked)


def _check_apart(configurations: Sequence[Configuration], directory: Path | None) -> None:
    """Raises a usage error where the trainings of a sweep would share a directory."""
    from manyhands.ui.plans import training_directory

    resume = next((one.start.resume for one in configurations), None)
    if resume not in (None, "latest"):
        raise click.UsageError(f"--resume {resume} is for one training: give resume=latest with --multirun")
    if directory is not None:
        return
    places = [
        training_directory(one, None)
        for one in configurations
        if resume or one.start.run or one.plan.run_id  # else each has a new name
    ]
    if len(set(places)) < len(places):
        raise click.UsageError(
            f"the trainings would share the directory {max(places, key=places.count)}: give --directory, below which "
            "each has one of its own, or leave run, run_id and resume out with --multirun"
        )


def devices_of(devices: str | None) -> list[int] | None:
    """Indexes of `0,1`. Raises a usage error."""
    if devices is None:
        return None
    try:
        return [int(part) for part in devices.split(",")]
    except ValueError:
        raise click.UsageError(f"--devices {devices}: expected indexes, as in 0,1") from None
