"""`manyhands eval CHECKPOINT`: a trained model on its task's own evaluation sets, or on tasks of lm-eval."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from manyhands.errors import StorageError
from manyhands.ui.command_line import Command, format_option

allow_task_option = click.option(
    "--allow-task",
    "allowed",
    multiple=True,
    metavar="MODULE:NAME",
    help="Let the training's plan name this code of yours.",
)

_TASK_COLUMNS = {
    "task": "task",
    "metric": "metric",
    "filter": "filter",
    "value": "value",
    "stderr": "± standard error",
    "samples": "documents",
    "fewshot": "few-shot",
}


@click.command("eval", cls=Command)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option(
    "--tasks",
    metavar="A,B",
    help="Tasks of lm-eval (extra: eval).  [default: the task's own evaluation sets]",
)
@click.option(
    "--num-fewshot", metavar="N", type=click.IntRange(min=0), help="Examples to show, with --tasks."
)
@click.option("--seed", metavar="S", type=click.IntRange(min=0), help="Which examples.  [default: 1234]")
@click.option(
    "--limit",
    metavar="N",
    type=click.IntRange(min=1),
    help="So many documents of each task, or samples of each set (whole batches).",
)
@click.option(
    "--include-path",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Task files of your own for lm-eval, with --tasks.",
)
@click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
@click.option(
    "--shards",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Where the training's shards are here.  [default: where they were]",
)
@click.option(
    "--pictures",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write a picture of predictions here for each set, of tasks that draw them.",
)
@allow_task_option
@format_option
def evaluate(
    checkpoint: str,
    tasks: str | None,
    num_fewshot: int | None,
    seed: int | None,
    limit: int | None,
    include_path: Path | None,
    device: str,
    shards: Path | None,
    pictures: Path | None,
    allowed: tuple[str, ...],
    output: str,
) -> None:
    """Evaluate a trained model: on its task's own sets, or with --tasks on those of lm-eval.

    CHECKPOINT is a checkpoint's directory, that of a training or of a run (then its newest), or a run's name. The
    task's own sets need the directory of its training, or of a run that was served from here. HF_HUB_OFFLINE=1 keeps
    lm-eval from the network.
    """
    from manyhands.ui.checkpoints import locate

    only = {"--num-fewshot": num_fewshot, "--seed": seed, "--include-path": include_path}
    if tasks is None and (without := [name for name, value in only.items() if value is not None]):
        raise click.UsageError(f"{without[0]} belongs to tasks of lm-eval: give --tasks too")
    found = locate(checkpoint)
    if tasks is None:
        _print_own(_own(found, device, limit, shards, pictures, allowed), output)
        return
    if pictures is not None or shards is not None:
        option = "--shards" if pictures is None else "--pictures"
        raise click.UsageError(f"{option} is for the task's own sets: leave out --tasks")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise click.UsageError(f"--tasks {tasks!r} names none, as in --tasks hellaswag,piqa")
    from manyhands.engine.device import choose_device
    from manyhands.engine.lm_eval_tasks import run_tasks
    from manyhands.ui.terminal import print_rows

    scores = run_tasks(
        found,
        names,
        device=choose_device(device),
        fewshot=num_fewshot,
        seed=1234 if seed is None else seed,
        limit=limit,
        include_path=include_path,
    )
    print_rows([asdict(score) for score in scores], _TASK_COLUMNS, output)


def _own(
    found: Path,
    device: str,
    limit: int | None,
    shards: Path | None,
    pictures: Path | None,
    allowed: tuple[str, ...],
) -> list[dict[str, Any]]:
    from manyhands.engine.device import choose_device
    from manyhands.engine.evaluate_checkpoint import evaluate_checkpoint
    from manyhands.ui.checkpoints import origin_of

    origin = origin_of(found, shards)
    if origin is None:
        raise click.UsageError(
            f"{found} lies in no directory of a training, nor of a run served from here, which have the plan and the "
            "evaluation sets: give such a directory, or --tasks for those of lm-eval"
        )
    evaluated = evaluate_checkpoint(
        found,
        origin.plan,
        origin.materials,
        device=choose_device(device),
        samples=limit,
        allowed=allowed,
    )
    return [
        {
            "set": each.set,
            "loss": each.result.loss,
            "samples": each.result.samples,
            "count": each.result.count,
            "unit": each.unit,
            "samples_per_s": round(each.result.samples / each.result.seconds, 1),
            "metrics": dict(each.result.metrics),
            "listings": {listing.name: list(listing.rows) for listing in each.result.listings},
            "picture": _kept(each.result.picture, pictures, each.set),
        }
        for each in evaluated
    ]


def _kept(picture: bytes | None, directory: Path | None, name: str) -> str | None:
    """The file that the picture of this set was written to."""
    if picture is None or directory is None:
        return None
    file = directory / f"{name}.png"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture)
    except OSError as error:
        raise StorageError(f"--pictures {directory}: {error}; choose another directory") from error
    return str(file)


def _print_own(rows: list[dict[str, Any]], output: str) -> None:
    """In a table each metric has a column; listings and pictures follow."""
    from manyhands.ui.terminal import print_json, table

    if output == "json":
        print_json(rows)
        return
    flat = [{**row, "count": f"{row['count']:,} {row['unit']}", **row["metrics"]} for row in rows]
    metrics = dict.fromkeys(name for row in rows for name in row["metrics"])
    columns = {
        "set": "set",
        "loss": "loss",
        "samples": "samples",
        "count": "mean over",
        "samples_per_s": "samples/s",
    }
    click.echo(table(flat, columns | {name: name.replace("_", " ") for name in metrics}))
    for row in rows:
        for name, listed in row["listings"].items():
            if listed:
                click.echo(f"\n{row['set']}: {name}\n{table(listed, {key: key for key in listed[0]})}")
        if row["picture"] is not None:
            click.echo(f"\npicture {row['picture']}")
