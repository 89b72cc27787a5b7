"""`manyhands train`: a plan's task on this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manyhands.ui.command_line import Command

if TYPE_CHECKING:
    from manyhands.plan.schema import Plan

PLAN_FILE = "plan.yaml"

NOT_YET = {
    "host": "training on another machine over SSH",
    "devices": "several devices",
    "shards": "shards of data",
    "tpg_dir": "shards of chess positions",
}


@click.command("train", cls=Command)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--plan", metavar="FILE", help="A plan file.  [default: the config `train` of manyhands]")
@click.option("--config-name", metavar="NAME", help="Another config: demo, mesh, dummy.")
@click.option(
    "--resume",
    type=click.Path(path_type=Path, exists=True),
    metavar="DIR",
    help="Go on from a checkpoint, or from the newest one of a training's directory.",
)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where checkpoints and events go.  [default: runs/<run id> in MANYHANDS_HOME]",
)
@click.option(
    "--device", metavar="DEVICE", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ..."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of forward and backward; weights stay fp32.",
)
@click.option(
    "--keep-checkpoints",
    metavar="N",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many to keep.",
)
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
@click.option("--host", metavar="NAME", help="Not available yet.")
@click.option("--devices", metavar="0,1", help="Not available yet.")
@click.option("--shards", metavar="DIR", help="Not available yet.")
@click.option("--tpg-dir", metavar="DIR", help="Not available yet.")
def train(
    overrides: tuple[str, ...],
    plan: str | None,
    config_name: str | None,
    resume: Path | None,
    directory: Path | None,
    device: str,
    precision: Any,
    keep_checkpoints: int,
    allowed: tuple[str, ...],
    logs: str | None,
    **later: str | None,
) -> None:
    """Train a plan's task on this machine alone: rounds.total * local.steps optimizer steps.

    KEY=VALUE sets anything of the plan, as in: manyhands train task=language_model local.optimizer.lr=0.003
    """
    for name, value in later.items():
        if value is not None:
            raise click.UsageError(
                f"--{name.replace('_', '-')} {value} is not available yet: {NOT_YET[name]}."
            )
    if plan is not None and config_name is not None:
        raise click.UsageError("--plan and --config-name contradict each other: give one")

    from manyhands.plan.resolve import new_run_id
    from manyhands.ui.live import TrainScreen, choose_logs
    from manyhands.ui.plans import plan_from

    directory = directory or (_directory_of(resume) if resume else None)
    if resume and directory and not (plan or config_name or overrides):
        plan = str(directory / PLAN_FILE)  # what it was started with
    chosen = plan_from(plan, overrides, config_name or "train")
    with TrainScreen(choose_logs(logs), chosen.name) as screen:
        screen.show({"kind": "loading", "text": "loading torch"})
        from manyhands.config import home
        from manyhands.engine.run import train as run
        from manyhands.engine.settings import Checkpoints, EngineSettings, Execution

        directory = directory or home() / "runs" / new_run_id(chosen)
        _keep_plan(chosen, directory)
        result = run(
            chosen,
            directory,
            resume=resume,
            settings=EngineSettings(
                exec=Execution(device=device, precision=precision), checkpoints=Checkpoints(keep=keep_checkpoints)
            ),
            on_event=screen.show,
            allowed_tasks=allowed,
        )
    if logs not in ("json", "none"):
        click.echo(
            f"validation loss {result.validation_loss_before:.4f} -> {result.validation_loss_after:.4f} in "
            f"{result.steps} steps, {result.tokens_per_s:,.0f} tokens/s"
        )
        click.echo(f"checkpoint {result.checkpoint}")


def _keep_plan(plan: Plan, directory: Path) -> None:
    """plan.yaml in the training's directory, written once: what --resume goes on with."""
    from manyhands.plan.resolve import dump_plan

    file = directory / PLAN_FILE
    if not file.exists():
        directory.mkdir(parents=True, exist_ok=True)
        file.write_text(dump_plan(plan), encoding="utf-8")


def _directory_of(resume: Path) -> Path:
    """The training's directory, from it or from a checkpoint in its checkpoints/."""
    path = resume.resolve()
    for place in (path, *path.parents):
        if (place / "events.jsonl").is_file():
            return place
    return path
