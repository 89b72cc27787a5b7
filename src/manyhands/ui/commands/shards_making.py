"""`manyhands shards pack | gen-endgames | import`, and `manyhands gen_tpg`: making shards."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from manyhands.ui.command_line import Command
from manyhands.ui.commands.shards import out_option, summary

if TYPE_CHECKING:
    from manyhands.data.shards.manifest import Manifest
    from manyhands.plan.schema import Plan
    from manyhands.ui.shard_progress import ProgressLine

FEWEST_POSITIONS: Final = 1024
"""Of a shard of endgames: fewer are a mistake, such as a number of millions."""

_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_processes = click.option(
    "--processes",
    metavar="N",
    type=click.IntRange(min=1),
    help="How many make shards.  [default: one per core]",
)
_shard_rows = click.option(
    "--rows-per-shard",
    "shard_rows",
    metavar="N",
    type=click.IntRange(min=1),
    help="Of each file; a kill loses at most what is in the making.  [default: 65,536, or 256 MiB]",
)


@click.command("pack", cls=Command)
@_overrides
@out_option
@click.option("--plan", metavar="FILE", help="A plan file.  [default: the config `train` of manyhands]")
@click.option("--config-name", metavar="NAME", help="Another config: demo, shakespeare_char, ...")
@click.option("--rows", metavar="N", type=click.IntRange(min=1), help="Training samples.  [default: all]")
@_shard_rows
@_processes
@click.option(
    "--allow-task",
    "allowed",
    multiple=True,
    metavar="MODULE:NAME",
    help="Let the plan name this code of yours.",
)
def pack(
    overrides: tuple[str, ...],
    out: Path,
    plan: str | None,
    config_name: str | None,
    rows: int | None,
    shard_rows: int | None,
    processes: int | None,
    allowed: tuple[str, ...],
) -> None:
    """Make shards of the data of any task, its evaluation sets too: manyhands shards pack --out DIR task=grids.

    The same command goes on where an interrupted one stopped.
    """
    from manyhands.ui.plans import configuration_from

    if plan is not None and config_name is not None:
        raise click.UsageError("--plan and --config-name contradict each other: give one")
    chosen = configuration_from(plan, overrides, config_name).plan
    _make(chosen, out, rows=rows, shard_rows=shard_rows, processes=processes, allowed=allowed)


def _endgame_options(function: Callable[..., Any]) -> Callable[..., Any]:
    options = (
        _overrides,
        click.option("--pieces", required=True, metavar="KPkp", help="White's in capitals, then Black's."),
        click.option(
            "--num-pos", required=True, type=int, metavar="N",
            help="Positions to train on. Those to judge by come on top: task.validation_positions=100000.",
        ),
        click.option(
            "--tpg-dir", "--out", "out", required=True, metavar="DIR", type=click.Path(path_type=Path),
            help="A new directory for the shards.",
        ),
        click.option(
            "--syzygy", metavar="DIR", type=click.Path(path_type=Path),
            help="Syzygy tables; three pieces need none.",
        ),
        _shard_rows,
        _processes,
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def _endgames(
    overrides: tuple[str, ...],
    pieces: str,
    num_pos: int,
    out: Path,
    syzygy: Path | None,
    shard_rows: int | None,
    processes: int | None,
) -> None:
    """Make random chess endgames with these pieces, and what is true of them: value, distance and every legal move.

    manyhands gen_tpg --pieces=KPkp --num_pos=1000000 --tpg_dir=DIR --syzygy=TABLES makes them, and
    manyhands train --tpg-dir=DIR trains on them. The same command goes on where an interrupted one stopped.
    """
    from manyhands.plan.compose import compose
    from manyhands.ui.plans import check_overrides, quoted

    if num_pos < FEWEST_POSITIONS:
        raise click.UsageError(
            f"--num-pos {num_pos}: too few for a shard, which has at least {FEWEST_POSITIONS:,} positions"
        )
    check_overrides(overrides)
    given = ["task=chess_endgames", f"task.pieces={quoted(pieces)}", f"task.positions={num_pos}"]
    if syzygy is not None:
        given.append(f"task.syzygy={quoted(str(syzygy.expanduser().resolve()))}")
    _make(compose([*given, *overrides]), out, rows=None, shard_rows=shard_rows, processes=processes)


gen_endgames = click.command("gen-endgames", cls=Command)(_endgame_options(_endgames))
gen_tpg = click.command("gen-tpg", cls=Command)(_endgame_options(_endgames))


@click.command("import", cls=Command)
@click.argument("sources", nargs=-1, required=True, metavar="TPG...", type=click.Path(path_type=Path))
@out_option
@_processes
def import_tpg(sources: tuple[Path, ...], out: Path, processes: int | None) -> None:
    """Make shards of TPG files (.zst) that exist: files, or directories of them.

    An eighth of the positions, by their hash, becomes the validation set; those that are no endings (castling rights,
    more than seven pieces) are left out and counted. The same command goes on where an
    interrupted one stopped.
    """
    from manyhands.tasks.tpg_shards import LEFT_OUT
    from manyhands.tasks.tpg_shards import import_tpg as take

    manifest = _told(
        "counting the records of the files",
        out,
        lambda line: take(sources, out, processes=processes, command=_command(), on_progress=line.rows),
    )
    if left_out := manifest.made[0].task[LEFT_OUT]:
        click.echo(
            f"left out: {left_out:,} positions with castling rights, or more pieces than endings here have"
        )


def _make(
    plan: Plan,
    out: Path,
    *,
    rows: int | None,
    shard_rows: int | None,
    processes: int | None,
    allowed: Sequence[str] = (),
) -> None:
    from manyhands.tasks.packing import pack as make

    _told(
        f"preparing the data of task {plan.task.name}",
        out,
        lambda line: make(
            plan,
            out,
            rows=rows,
            shard_rows=shard_rows,
            processes=processes,
            allowed=allowed,
            command=_command(),
            on_progress=line.rows,
        ),
    )


def _told(first: str, out: Path, make: Callable[[ProgressLine], Manifest]) -> Manifest:
    """Make shards, telling how it goes."""
    from manyhands.errors import Interrupted
    from manyhands.ui.shard_progress import ProgressLine

    with ProgressLine() as line:
        line.say(first)
        try:
            manifest = make(line)
        except KeyboardInterrupt:
            raise Interrupted(
                f"interrupted; what is made is kept in {out}, and the same command goes on from there"
            ) from None
    click.echo(summary(manifest, out))
    return manifest


def _command() -> str:
    return shlex.join(["manyhands", *sys.argv[1:]])
