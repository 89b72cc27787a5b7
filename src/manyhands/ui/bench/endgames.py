"""Measurements of the chess endgames task: what a network knows after a bounded time, and positions/s of training.

The plan is the config `endgames` (docs/endgames.md), KPkp. Its tables are those in the directory that
MANYHANDS_SYZYGY names; without it nothing is measured. MANYHANDS_BENCH_MINUTES bounds the training (3 by default; the
figure of the project is for an hour): the steps that fit are estimated first, so that the schedule comes to its end.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from manyhands.errors import PlanError
from manyhands.plan.compose import compose
from manyhands.plan.schema import Plan
from manyhands.ui.bench.harness import Measured

JUDGED: Final = 100_000
"""Positions of the final evaluation, none of them ever trained on."""
LONGEST: Final = 10
"""Minutes: no measurement takes more than a quarter of an hour (harness.py)."""
_PIECE: Final = 50
"""Steps between two looks at the clock."""


def endgame_accuracy() -> Measured:
    """Percent of JUDGED positions whose value is right after a training of that many minutes on all cores."""
    tables, minutes = _tables(), float(os.environ.get("MANYHANDS_BENCH_MINUTES", "3"))
    if not 0 < minutes <= LONGEST:
        raise PlanError(f"MANYHANDS_BENCH_MINUTES is {minutes}: above 0 and at most {LONGEST} was expected")
    if tables is None:
        return _nothing()
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        os.environ["MANYHANDS_HOME"] = name  # where what is decoded of the tables is kept, once
        rate = _trained(Path(name) / "trial", tables, pieces=4)[1]
        pieces = max(1, round(rate * minutes * 60 / (_PIECE * _plan(tables, 1).local.batch_size)))
        started = time.perf_counter()
        plan, _ = _trained(Path(name) / "training", tables, pieces=pieces)
        seconds = time.perf_counter() - started
        metrics = _judged(plan, Path(name) / "training")
    positions = pieces * _PIECE * plan.local.batch_size
    return Measured(
        value=100 * metrics["value_accuracy"],
        note=f"KPkp after {seconds:.0f} s and {positions:,} positions with {os.cpu_count()} threads, on {JUDGED:,} "
        f"others; policy {100 * metrics['policy_accuracy']:.2f} %",
    )


def endgame_rate() -> Measured:
    """Positions/s of that training, made, labelled and learned."""
    tables = _tables()
    if tables is None:
        return _nothing()
    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        os.environ["MANYHANDS_HOME"] = name  # where what is decoded of the tables is kept, once
        _trained(Path(name) / "trial", tables, pieces=1)  # decodes the tables
        _, rate = _trained(Path(name) / "training", tables, pieces=8)
    return Measured(value=rate, note=f"KPkp, 64 x 4 x 4 over pieces, {os.cpu_count()} threads")


def _plan(tables: Path, pieces: int) -> Plan:
    return compose(
        [
            f"task.syzygy='{tables}'",
            f"local.steps={_PIECE}",
            f"rounds.total={pieces}",
            f"schedule.warmup_steps={min(500, pieces * _PIECE // 10)}",
            f"rounds.snapshot_every={pieces}",
            "evaluation.every_snapshots=0",
            "evaluation.max_batches=1",
        ],
        config_name="endgames",
    )


def _trained(directory: Path, tables: Path, *, pieces: int) -> tuple[Plan, float]:
    """The plan, and positions/s after the first piece, which warms up."""
    from manyhands.engine.run import train
    from manyhands.engine.settings import EngineSettings, Execution, Logging

    plan, times = _plan(tables, pieces), list[float]()

    def see(event: dict[str, Any]) -> None:
        if event["kind"] == "step":
            times.append(time.perf_counter())

    settings = EngineSettings(exec=Execution(threads=os.cpu_count()), logging=Logging(every_steps=_PIECE))
    result = train(plan, directory, settings=settings, on_event=see)
    if len(times) < 2:
        return plan, result.tokens_per_s
    return plan, (len(times) - 1) * _PIECE * plan.local.batch_size / (times[-1] - times[0])


def _judged(plan: Plan, directory: Path) -> dict[str, float]:
    from manyhands.engine.device import choose_device
    from manyhands.engine.evaluate_checkpoint import evaluate_checkpoint
    from manyhands.engine.kept_checkpoints import find_checkpoint

    device, checkpoint = choose_device("auto"), find_checkpoint(directory)
    (found,) = evaluate_checkpoint(checkpoint, plan, directory / "materials", device=device, samples=JUDGED)
    return dict(found.result.metrics)


def _tables() -> Path | None:
    named = os.environ.get("MANYHANDS_SYZYGY")
    return None if named is None else Path(named).expanduser().resolve()


def _nothing() -> Measured:
    return Measured(value=None, note="needs the tables of four men: MANYHANDS_SYZYGY=DIR")
