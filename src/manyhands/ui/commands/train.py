"""`manyhands train`: a plan's task on devices of one's own, with one process or many."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyhands.ui.command_line import Command

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration
    from manyhands.engine.launch import Nodes
    from manyhands.engine.run import TrainResult

SHORT = {
    "device": "exec.device",
    "precision": "exec.precision",
    "keep_checkpoints": "checkpoints.keep",
    "data_parallelism": "parallel.data_parallelism",
    "tensor_parallelism": "parallel.tensor_parallelism",
    "micro_batch_size": "parallel.micro_batch_size",
    "optim_stats_steps": "logging.optim_stats_steps",
}
"""Options that are another way to write KEY=VALUE."""


@click.command("train", cls=Command)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--plan", metavar="FILE", help="A plan file.  [default: the config `train` of manyhands]")
@click.option("--config-name", metavar="NAME", help="Another config: demo, mesh, shakespeare_char, ...")
@click.option("--config-dir", metavar="DIR", help="Configs of your own, before those of manyhands.")
@click.option(
    "--cfg", type=click.Choice(["job"]), help="Print the composed configuration, and train nothing."
)
@click.option(
    "--multirun",
    "-m",
    is_flag=True,
    help="Train each combination of values, as in optimizer.lr=1e-3,3e-4 seed=1,2.",
)
@click.option(
    "--resume",
    metavar="DIR",
    help="Go on from a checkpoint, a training's directory, or `latest`, this one's own.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where checkpoints and events go.  [default: runs/<name> in MANYHANDS_HOME]",
)
@click.option("--devices", metavar="0,1", help="One process on each, indexes within CUDA_VISIBLE_DEVICES.")
@click.option(
    "--data-parallelism", metavar="N", type=click.IntRange(min=1), help="Processes that share a batch."
)
@click.option(
    "--tensor-parallelism", metavar="N", type=click.IntRange(min=1), help="Processes that share each matrix."
)
@click.option("--micro-batch-size", metavar="N", type=click.IntRange(min=1), help="Samples per forward pass.")
@click.option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, ...  [default: auto]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "pure_bf16"]),
    help="Of the computation.  [default: fp32]",
)
@click.option(
    "--optim-stats-steps", metavar="N", type=click.IntRange(min=0), help="Report norms by tensor so often."
)
@click.option("--keep-checkpoints", metavar="N", type=click.IntRange(min=1), help="How many.  [default: 2]")
@click.option(
    "--allow-task",
    "allowed",
    multiple=True,
    metavar="MODULE:NAME",
    help="Let the plan name this code of yours.",
)
@click.option(
    "--logs",
    type=click.Choice(["tui", "console", "json", "none"]),
    help="What to show.  [default: tui on a terminal, else console]",
)
@click.option(
    "--kept", is_flag=True, hidden=True, help="Configuration from --directory: a process of a group."
)
@click.option(
    "--host",
    "hosts",
    multiple=True,
    metavar="NAME[,NAME]",
    help="Train on another machine, or one training on several. With -m, give it once for each.",
)
@click.option(
    "--export/--no-export",
    default=True,
    help="With --host: ONNX of each kept checkpoint, made there.  [default: yes]",
)
@click.option(
    "--upload-shards",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="With --host: send the shards of this directory there, and train on them.",
)
@click.option(
    "--shards",
    "--tpg-dir",
    "shards",
    metavar="DIR",
    help="Train on the shards there; the task is theirs.",
)
@click.option(
    "--pieces", metavar="KPkp", help="Chess endgames with these pieces; with --shards, only a check."
)
def train(
    overrides: tuple[str, ...],
    plan: str | None,
    config_name: str | None,
    config_dir: str | None,
    cfg: str | None,
    multirun: bool,
    resume: str | None,
    directory: Path | None,
    devices: str | None,
    allowed: tuple[str, ...],
    logs: str | None,
    kept: bool,
    hosts: tuple[str, ...],
    export: bool,
    upload_shards: Path | None,
    shards: str | None,
    pieces: str | None,
    **options: Any,
) -> None:
    """Train a plan's task: rounds.total * local.steps optimizer steps.

    KEY=VALUE sets anything of the plan and of the engine: manyhands train task=grids optimizer.lr=3e-4 processes=2.
    Started by hand or by torchrun: rank=0 world_size=4, or torchrun --nproc-per-node 4 -m manyhands train.
    """
    if plan is not None and config_name is not None:
        raise click.UsageError("--plan and --config-name contradict each other: give one")
    if multirun and not hosts:
        _sweep(overrides)
        return
    given = [f"{key}={options[name]}" for name, key in SHORT.items() if options[name] is not None]

    def compose(words: Sequence[str], shards: str | None) -> Configuration:
        """With shards in a directory of this machine."""
        from manyhands.ui.plans import CONFIGS, check_pieces, configuration_from, quoted

        given_too = [] if resume is None else [f"resume={quoted(resume)}"]
        if shards is not None:
            given_too.append(f"data.shards={quoted(shards)}")
            check_pieces(pieces, shards)
        elif pieces is not None:
            given_too.append(f"task.pieces={quoted(pieces)}")
        below = CONFIGS["chess_endgames"] if pieces is not None and plan is resume is None else None
        kept_in = directory if kept else None
        words = [*words, *given, *given_too]
        return configuration_from(plan, words, config_name or below, config_dir, kept=kept_in, shards=shards)

    if hosts and cfg is None:
        from manyhands.ui.train_there import There

        there = There(
            hosts=hosts,
            directory=directory,
            devices=None if devices is None else tuple(_indexes(devices) or ()),
            allowed=allowed,
            logs=logs,
            shards=shards,
            upload=upload_shards,
            export=export,
        )
        raise click.exceptions.Exit((there.sweep if multirun else there.train)(compose, overrides))
    if upload_shards is not None or not export:
        raise click.UsageError(
            "--upload-shards and --no-export are for a training on another machine (--host)"
        )
    configuration = compose(overrides, None if shards is None else str(Path(shards).expanduser().resolve()))
    if cfg is not None:
        click.echo(configuration.as_yaml(), nl=False)
        return
    if configuration.settings.exec.run_in_docker and not kept:
        raise click.UsageError("exec.run_in_docker=true is for a training on another machine: give --host")
    _Training(configuration, directory, allowed, logs).carry_out(devices, started=kept)


class _Training:
    """One training, from its configuration to its last line."""

    def __init__(
        self, configuration: Configuration, directory: Path | None, allowed: Sequence[str], logs: str | None
    ) -> None:
        from manyhands.ui.plans import training_directory

        self._configuration, self._allowed, self._logs = configuration, allowed, logs
        self._directory = training_directory(configuration, directory)

    def carry_out(self, devices: str | None, *, started: bool) -> None:
        """Here, or in processes of its own when several are asked for."""
        start = self._configuration.start
        indexes = _indexes(devices)
        processes = start.processes or len(indexes or [0])
        if indexes is not None and len(indexes) != processes:
            raise click.UsageError(
                f"--devices {devices} are {len(indexes)}, processes={processes}: give one of the two"
            )
        several = processes > 1 or indexes is not None or start.nodes is not None
        if started and start.processes is None and start.nodes is None:
            self._here()
            return
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
            tell=lambda text: click.echo(text, err=True),
            among=self._among(Nodes),
        )
        if code:
            raise click.exceptions.Exit(code)

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

    def _command(self) -> list[str]:
        command = ["-m", "manyhands", "train", "--kept", "--directory", str(self._directory)]
        for target in self._allowed:
            command += ["--allow-task", target]
        if self._logs is not None:
            command += ["--logs", self._logs]
        if self._configuration.start.resume is not None:
            command += ["--resume", self._configuration.start.resume]
        return command

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

            place, resume = self._place(), self._resume()
            check_trainable(configuration.plan, place, self._directory, resume, configuration.settings)
            if leads:
                configuration.keep(self._directory)
            result = run(
                configuration.plan,
                self._directory,
                settings=configuration.settings,
                resume=resume,
                place=place,
                on_event=screen.show,
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
            )

        return Place(rank=rank, world_size=world_size, meet=meet, machine=this_machine())

    def _resume(self) -> Path | None:
        resume = self._configuration.start.resume
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if resume == "latest" or again:
            from manyhands.engine.checkpoint import checkpoints

            if checkpoints(self._directory / "checkpoints"):
                return self._directory
        return Path(resume) if resume not in (None, "latest") else None


def _print(result: TrainResult) -> None:
    click.echo(
        f"validation loss {result.validation_loss_before:.4f} -> {result.validation_loss_after:.4f} in "
        f"{result.steps} steps, {result.tokens_per_s:,.0f} tokens/s"
    )
    click.echo(f"checkpoint {result.checkpoint}")


def _sweep(overrides: Sequence[str]) -> None:
    """Each combination in a process of its own, one after the other, as this command line without --multirun."""
    from manyhands.plan.compose import sweep

    combinations = sweep(overrides)
    others = [word for word in sys.argv[1:] if word not in overrides and word not in ("--multirun", "-m")]
    for number, combination in enumerate(combinations, start=1):
        click.echo(f"[{number}/{len(combinations)}] {' '.join(combination)}", err=True)
        code = subprocess.run(
            [sys.executable, "-m", "manyhands", *others, *combination], check=False
        ).returncode
        if code:
            raise click.exceptions.Exit(code)


def _indexes(devices: str | None) -> list[int] | None:
    if devices is None:
        return None
    try:
        return [int(part) for part in devices.split(",")]
    except ValueError:
        raise click.UsageError(f"--devices {devices}: expected indexes, as in 0,1") from None
