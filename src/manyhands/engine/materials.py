"""When a training's materials are whole: a mark beside them, written last, which names the first weights."""

from __future__ import annotations

from pathlib import Path


def prepared_mark(materials: Path, plan_hash: str) -> Path:
    """Of the materials of this plan; its text is the file name of the first weights."""
    return materials / f"prepared-{plan_hash[:16]}"
