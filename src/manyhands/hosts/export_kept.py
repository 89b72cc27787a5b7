"""On the host, beside a training and after it: an ONNX graph of each checkpoint that is kept, as `manyhands export`
makes it.

    python -m manyhands.hosts.export_kept DIRECTORY [--allow-task MODULE:NAME]

Writes <directory>/exports/<checkpoint>.onnx, and its results beside it (engine/results.py), and removes those of
checkpoints that are not kept any more. The last checkpoint waits for the end: its results say how the training ended.
What cannot be exported is said in one line, and is no fault.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from manyhands.config.checkpoint_names import TRAINING, name_of, numbered
from manyhands.engine.configuration import kept_configuration
from manyhands.engine.events import read_events
from manyhands.engine.results import ENDINGS, SUFFIX, write_results
from manyhands.errors import ManyhandsError, MissingExtra
from manyhands.hosts.exports import DIRECTORY, forget_exports

_BEGINNINGS = ("started", "resumed")


def export_kept(directory: Path, allowed: Sequence[str] = ()) -> list[str]:
    """A line for each checkpoint that has no graph yet: what was written, or why nothing was."""
    forget_exports(directory)
    wanted = _wanted(directory)
    if not wanted:
        return []
    from manyhands.engine.export import export_onnx
    from manyhands.engine.saved_run import own_family
    from manyhands.tasks.saved import load_saved

    lines: list[str] = []
    family = own_family(kept_configuration(directory).plan, allowed)
    for checkpoint in wanted:
        try:
            exported = export_onnx(load_saved(checkpoint, family), _graph(directory, checkpoint))
            write_results(exported, checkpoint, directory, half=False)
        except MissingExtra as error:
            return [*lines, f"no ONNX export: {error}"]
        except ManyhandsError as error:
            if checkpoint.is_dir():  # else it has gone meanwhile, in favour of a newer one
                lines.append(f"no ONNX export of {checkpoint.name}: {error}")
        else:
            lines.append(f"exported {exported.file.name}, {exported.size_bytes:,} bytes")
    forget_exports(directory)
    return lines


def _wanted(directory: Path) -> list[Path]:
    """The checkpoints without a graph, or with that of an older one of the same name: they were made once more."""
    plan = kept_configuration(directory).plan
    last = name_of(TRAINING, plan.rounds.total * plan.local.steps)
    ended = _has_ended(directory)
    wanted = []
    for checkpoint in numbered(directory / "checkpoints", TRAINING):
        results = Path(f"{_graph(directory, checkpoint)}{SUFFIX}")  # written last
        made = results.exists() and results.stat().st_mtime >= checkpoint.stat().st_mtime
        if not made and (ended or checkpoint.name != last):
            wanted.append(checkpoint)
    return wanted


def _graph(directory: Path, checkpoint: Path) -> Path:
    return directory / DIRECTORY / f"{checkpoint.name}.onnx"


def _has_ended(directory: Path) -> bool:
    """Whether it has not begun again since its last end."""
    turns = [
        e["kind"] for e in read_events(directory / "events.jsonl") if e["kind"] in (*_BEGINNINGS, *ENDINGS)
    ]
    return bool(turns) and turns[-1] in ENDINGS


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m manyhands.hosts.export_kept")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--allow-task", action="append", default=[])
    asked = parser.parse_args(arguments)
    try:
        for line in export_kept(asked.directory, asked.allow_task):
            print(line, flush=True)
    except (ManyhandsError, OSError) as error:  # such as a checkpoint that goes at this moment
        print(f"no ONNX export: {error}", flush=True)


if __name__ == "__main__":
    main()
