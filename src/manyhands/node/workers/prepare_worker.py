"""The process that makes a run's materials, first weights and parameter table from a plan, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyhands.node.workers.channel import open_channel
from manyhands.plan.schema import Plan
from manyhands.tasks.registry import family_of
from manyhands.updates.participant import first_public, save_public


def prepare(plan: dict[str, Any], directory: str, allowed_tasks: list[str]) -> dict[str, Any]:
    """Files by name, the parameter table, the number of samples, and the first snapshot with its fingerprint."""
    parsed = Plan.model_validate(plan)
    place = Path(directory)
    made = family_of(parsed, allowed=allowed_tasks).prepare(parsed, place)
    public = first_public(parsed, made.parameters, made.first_weights)
    snapshot = place / "first-snapshot.safetensors"
    fingerprint = save_public(public, snapshot)
    return {
        "materials": {name: str(path) for name, path in made.materials.items()},
        "samples": made.samples,
        "parameters": [parameter.model_dump(mode="json") for parameter in made.parameters],
        "first_snapshot": str(snapshot),
        "fingerprint": fingerprint,
    }


def main() -> None:
    open_channel().serve({"prepare": prepare})


if __name__ == "__main__":
    main()
