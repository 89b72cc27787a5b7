"""What a person wants to know of an exported model, as JSON beside it: where it was trained, with what, and how well.

Read from the training's directory: plan.yaml, engine.yaml and events.jsonl, up to the step of the checkpoint. Of a
checkpoint that lies elsewhere only what the export itself knows is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from manyhands.engine.configuration import kept_configuration
from manyhands.engine.events import read_events
from manyhands.errors import StorageError
from manyhands.plan.resolve import PLAN_FILE
from manyhands.storage.durable import write_whole

if TYPE_CHECKING:
    from manyhands.engine.export import Exported

RESULTS_VERSION: Final = 1
SUFFIX: Final = ".json"
ENDINGS: Final = ("finished", "interrupted")


def write_results(exported: Exported, checkpoint: Path, training: Path | None, *, half: bool) -> Path:
    """Write `<exported file>.json`, and return its path. `training`: its directory. Raises StorageError, PlanError.

    hosts, config (plan and engine), ended (UTC), status (finished, interrupted, or unfinished where neither was
    said), step, steps, samples, parameters, duration_s (preparation and evaluations included), losses (of the
    training, and of each evaluation set), metrics by set; and what was exported, with its difference from torch.
    """
    results = {
        "version": RESULTS_VERSION,
        **_of_training(training, checkpoint),
        "exported": {
            "file": exported.file.name,
            "checkpoint": checkpoint.name,
            "precision": "fp16" if half else "fp32",
            "size_bytes": exported.size_bytes,
            "difference_from_torch": exported.difference,
        },
    }
    file = exported.file.with_name(exported.file.name + SUFFIX)
    try:
        write_whole(file, json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{file}: {error}; choose another --output") from error
    return file


def _of_training(training: Path | None, checkpoint: Path) -> dict[str, Any]:
    if training is None or not (training / PLAN_FILE).is_file():
        return {}
    configuration = kept_configuration(training)
    plan = configuration.plan
    events = _course(training / "events.jsonl", checkpoint)
    last = {event["kind"]: event for event in events}
    started, step = last.get("started", {}), last.get("step", {})
    ended = [kind for event in events if (kind := event["kind"]) in ENDINGS]
    evaluated = {event["set"]: event for event in events if event["kind"] == "evaluation"}
    return {
        "hosts": started.get("hosts"),
        "config": {
            "plan": plan.model_dump(mode="json"),
            "engine": configuration.settings.model_dump(mode="json"),
        },
        "ended": _utc(events[-1]["time_ms"]) if events else None,
        "status": ended[-1] if ended else "unfinished",
        "step": step.get("step", 0),
        "steps": plan.rounds.total * plan.local.steps,
        "samples": step.get("step", 0) * plan.local.batch_size,
        "parameters": started.get("parameters"),
        "duration_s": _duration_s(events),
        "losses": {"training": step.get("loss"), **{name: e["loss"] for name, e in evaluated.items()}},
        "metrics": {name: event["metrics"] for name, event in evaluated.items()},
    }


def _course(file: Path, checkpoint: Path) -> list[dict[str, Any]]:
    """The events that led to the checkpoint, without those of later steps or of a course that was given up."""
    try:
        events = read_events(file)
    except (OSError, ValueError) as error:
        raise StorageError(f"{file}: {error}; the training's events are needed for the results") from error
    number = checkpoint.name.partition("-")[2]
    until = int(number) if number.isdecimal() else sys.maxsize
    course: list[dict[str, Any]] = []
    for event in events:
        if event["kind"] == "resumed":
            if event["step"] >= until:
                break
            course = [earlier for earlier in course if earlier.get("step", 0) <= event["step"]]
        course.append(event)
    return [event for event in course if event.get("step", 0) <= until]


def _duration_s(events: Sequence[dict[str, Any]]) -> float:
    """From the first event to the last, without the time between an end and the start that went on."""
    spent = (
        later["time_ms"] - earlier["time_ms"]
        for earlier, later in pairwise(events)
        if earlier["kind"] not in ENDINGS and later["kind"] != "resumed"
    )
    return float(sum(spent)) / 1000


def _utc(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
