"""When a training's materials are whole: a mark beside them, written last, which names the first weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.storage.durable import sync, write_whole
from manyhands.tasks.protocol import Prepared, TaskFamily


def prepared_mark(materials: Path, plan_hash: str) -> Path:
    """Of the materials of this plan; its text is the file name of the first weights."""
    return materials / f"prepared-{plan_hash[:16]}"


def prepare(family: TaskFamily, plan: Plan, materials: Path) -> Prepared:
    """Make the materials of a plan, durably, in the place of those of any other. Raises DataError, PlanError."""
    for mark in materials.glob("prepared-*"):
        mark.unlink()
    prepared = family.prepare(plan, materials)
    for file in (*prepared.materials.values(), prepared.first_weights):
        sync(file)
    write_whole(prepared_mark(materials, plan_hash(plan)), prepared.first_weights.name + "\n")
    return prepared


def hash_of(file: Path) -> str:
    """SHA-256, 64 hex digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
