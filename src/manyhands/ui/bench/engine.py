"""Measurements of training on this machine alone."""

from __future__ import annotations

import tempfile
from pathlib import Path

from manyhands.plan.compose import compose
from manyhands.ui.bench.harness import Measured


def train_rate() -> Measured:
    """The demo's model and batch on 1 MB of text, two pieces of local.steps; evaluation and saving left out."""
    from manyhands.engine.run import train

    plan = compose(["rounds.total=2", "task.text.max_bytes=1000000", "evaluation.every_snapshots=0"], "demo")
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as directory:
        result = train(plan, Path(directory))
    return Measured(value=result.tokens_per_s, note=f"{result.steps} steps on the CPU, first steps included")
