"""On the host, after a training: an ONNX graph of each checkpoint that was kept, as `manyhands export` makes it.

    python -m manyhands.hosts.export_kept DIRECTORY [--allow-task MODULE:NAME]

Writes <directory>/exports/<checkpoint>.onnx, and its results beside it (engine/results.py). What cannot be exported
is said in one line, and is no fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from manyhands.engine.configuration import kept_configuration
from manyhands.errors import ManyhandsError, MissingExtra

DIRECTORY = "exports"


def export_kept(directory: Path, allowed: Sequence[str] = ()) -> list[str]:
    """A line for each checkpoint: what was written, or why nothing was."""
    from manyhands.engine.checkpoint import checkpoints
    from manyhands.engine.export import export_onnx
    from manyhands.engine.results import write_results
    from manyhands.engine.saved_run import own_family
    from manyhands.tasks.saved import load_saved

    lines: list[str] = []
    plan = kept_configuration(directory).plan
    for checkpoint in checkpoints(directory / "checkpoints"):
        file = directory / DIRECTORY / f"{checkpoint.name}.onnx"
        if file.exists():
            continue
        try:
            exported = export_onnx(load_saved(checkpoint, own_family(plan, allowed)), file)
            write_results(exported, checkpoint, directory, half=False)
        except MissingExtra as error:
            return [*lines, f"no ONNX export: {error}"]
        except ManyhandsError as error:
            lines.append(f"no ONNX export of {checkpoint.name}: {error}")
        else:
            lines.append(f"exported {file.name}, {exported.size_bytes:,} bytes")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m manyhands.hosts.export_kept")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--allow-task", action="append", default=[])
    asked = parser.parse_args(arguments)
    try:
        for line in export_kept(asked.directory, asked.allow_task):
            print(line, flush=True)
    except ManyhandsError as error:
        print(f"no ONNX export: {error}", flush=True)


if __name__ == "__main__":
    main()
