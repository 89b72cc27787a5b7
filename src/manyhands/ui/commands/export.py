"""`manyhands export CHECKPOINT --to onnx|safetensors`: a trained model for other programs."""

from __future__ import annotations

from pathlib import Path

import click

from manyhands.ui.command_line import Command
from manyhands.ui.commands.evaluate import allow_task_option

SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors"}


@click.command("export", cls=Command)
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("--to", "form", type=click.Choice(list(SUFFIXES)), required=True, help="What to write.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Where to.  [default: the checkpoint's name here, as step-00000600.onnx, or .fp16.onnx]",
)
@click.option("--fp16", is_flag=True, help="Weights, and ONNX's computation, in half precision.")
@allow_task_option
def export(checkpoint: str, form: str, output: Path | None, fp16: bool, allowed: tuple[str, ...]) -> None:
    """Write a trained model for other programs.

    onnx: a graph with free batch, and sequence where there is one, compared with torch in onnxruntime before it is
    kept (extra: onnx). safetensors: the weights alone; an adapter is merged into its base.

    Beside it lies FILE.json: configuration, losses, metrics, duration and hosts of its training.

    CHECKPOINT is a checkpoint's directory, that of a training or of a run (then its newest), or a run's name.
    """
    from manyhands.ui.checkpoints import locate, origin_of
    from manyhands.ui.plans import training_of
    from manyhands.ui.terminal import human_bytes

    found = locate(checkpoint)
    file = output or Path(found.name + (".fp16" if fp16 else "") + SUFFIXES[form])
    if file.exists():
        raise click.UsageError(f"--output {file}: it exists already; remove it, or choose another")
    from manyhands.engine.export import export_onnx, export_safetensors
    from manyhands.engine.results import write_results
    from manyhands.engine.saved_run import own_family
    from manyhands.tasks.saved import load_saved

    origin = origin_of(found)
    saved = load_saved(found, own_family(None if origin is None else origin.plan, allowed))
    exported = (export_onnx if form == "onnx" else export_safetensors)(saved, file, half=fp16)
    results = write_results(exported, found, training_of(str(found)), half=fp16)
    click.echo(f"{exported.file}  {human_bytes(exported.size_bytes)}")
    if exported.difference is not None:
        click.echo(
            f"max abs difference from torch {exported.difference:.2e}, at outputs up to {exported.largest:.3g}"
        )
    click.echo(f"results {results}")
