"""`manyhands train`: a plan's task on devices of one's own, with one process or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyhands.ui.command_line import Command

if TYPE_CHECKING:
    from manyhands.engine.configuration import Configuration

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


@dataclass(frozen=True, slots=True)
class _Composition:
    """The configuration that a command line means, of its KEY=VALUE words and of shards in a directory here."""

    plan: str | None
    config_name: str | None
    config_dir: str | None
    resume: str | None
    pieces: str | None
    kept: Path | None
    given: Sequence[str]

    def __call__(self, words: Sequence[str], shards: str | None) -> Configuration:
        from manyhands.ui.plans import CONFIGS, check_pieces, configuration_from, quoted

        words, below = [*words, *self.given], self.config_name
        if self.resume is not None:
            words.append(f"resume={quoted(self.resume)}")
        if shards is not None:
            words.append(f"data.shards={quoted(shards)}")
            check_pieces(self.pieces, shards)
        elif self.pieces is not None:
            words.append(f"task.pieces={quoted(self.pieces)}")
        if self.pieces is not None and below is None and self.plan is None and self.resume is None:
            below = CONFIGS["chess_endgames"]
        return configuration_from(self.plan, words, below, self.config_dir, kept=self.kept, shards=shards)


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
    help="Go on from a checkpoint, a training's directory or name, or `latest`, this one's own.",
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
@click.option("--syzygy", metavar="DIR", help="With --pieces: where their Syzygy tables are.")
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
    syzygy: str | None,
    **options: Any,
) -> None:
    """Train a plan's task: rounds.total * local.steps optimizer steps.

    KEY=VALUE sets anything of the plan and of the engine: manyhands train task=grids optimizer.lr=3e-4 processes=2.
    Started by hand or by torchrun: rank=0 world_size=4, or torchrun --nproc-per-node 4 -m manyhands train.
    """
    from manyhands.ui.plans import quoted, training_directory
    from manyhands.ui.train_here import Here, devices_of, sweep_here

    if plan is not None and config_name is not None:
        raise click.UsageError("--plan and --config-name contradict each other: give one")
    given = [f"{key}={options[name]}" for name, key in SHORT.items() if options[name] is not None]
    if syzygy is not None:
        given.append(f"task.syzygy={quoted(syzygy)}")
    compose = _Composition(plan, config_name, config_dir, resume, pieces, directory if kept else None, given)
    if hosts and cfg is None:
        from manyhands.ui.train_there import There

        there = There(
            hosts=hosts,
            directory=directory,
            devices=None if devices is None else tuple(devices_of(devices) or ()),
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
    place = None if shards is None else str(Path(shards).expanduser().resolve())
    if multirun and not hosts:
        sweep_here(lambda words: compose(words, place), overrides, directory)
        return
    configuration = compose(overrides, place)
    if cfg is not None:
        click.echo(configuration.as_yaml(), nl=False)
        return
    if configuration.settings.exec.run_in_docker and not kept:
        raise click.UsageError("exec.run_in_docker=true is for a training on another machine: give --host")
    if kept or configuration.start.by_hand() or configuration.start.nodes is not None:  # others are in it too
        Here(configuration, directory, allowed, logs).train(devices, started=kept)
        return
    from manyhands.ui.failed_starts import removed_if_nothing_came_of_it

    directory = training_directory(configuration, directory)
    with removed_if_nothing_came_of_it(directory):
        Here(configuration, directory, allowed, logs).train(devices, started=False)
