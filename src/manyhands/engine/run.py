"""`train`: a plan's task on this machine alone, from the first weights or from a checkpoint to the last step.

The same task, step, optimizer, schedule and order of data as in a networked run, without rounds:
rounds.total * local.steps optimizer steps. Progress is structured events, appended to events.jsonl and
handed to a callback; no one parses printed text.

    <directory>/materials/      what the task prepared, made once
    <directory>/checkpoints/    engine/checkpoint.py
    <directory>/events.jsonl    one JSON object per line: version, time_ms, kind, and the kind's own fields
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file

from manyhands.coordination.schedule import learning_rates
from manyhands.data.ranges import indices_of, ranges_between
from manyhands.engine.checkpoint import (
    Cursor,
    Training,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from manyhands.engine.device import choose_device
from manyhands.engine.evaluation import evaluate
from manyhands.engine.optimizer import build_optimizer
from manyhands.engine.precision import Precision
from manyhands.engine.step import Steering, Step, training_step
from manyhands.engine.trainer import load_weights, seed_everything
from manyhands.errors import Interrupted, ManyhandsError, PlanError, WorkerError
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.tasks.protocol import Task
from manyhands.tasks.registry import family_of

EVENTS_VERSION = 1
LOG_EVERY_STEPS = 10

Event = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What came of a training. Losses are in the task's own unit, validation losses over the same samples."""

    directory: Path
    checkpoint: Path
    steps: int
    loss: float  # mean training loss since the last report
    validation_loss_before: float
    validation_loss_after: float
    tokens: int  # in this process, without what an earlier one did
    seconds: float  # of training, without preparation and evaluation
    tokens_per_s: float


def train(
    plan: Plan,
    directory: Path,
    *,
    resume: Path | None = None,
    device: str = "auto",
    precision: Precision = "fp32",
    on_event: Callable[[Event], None] | None = None,
    allowed_tasks: Collection[str] = (),
    keep_checkpoints: int = 2,
) -> TrainResult:
    """Train and return what came of it; checkpoints and events are in `directory`.

    `resume`: a checkpoint, or a directory that holds some (then the newest): goes on exactly where it was.
    SIGINT and SIGTERM finish the step, save and raise Interrupted; a second one ends at once. Raises
    PlanError, DataError, Refused (a checkpoint of another plan), StorageError, WorkerError (the loss is not
    finite).
    """
    if plan.local.kind != "steps":
        raise PlanError(
            f"local.kind is {plan.local.kind!r}: training on this machine alone takes optimizer steps; set "
            "local.kind=steps with local.optimizer, or run the plan with a server"
        )
    ties: tuple[tuple[str, bool | float, str], ...] = (
        ("local.proximal", plan.local.proximal, "0"),
        ("local.control_variate", plan.local.control_variate, "false"),
    )
    for setting, value, off in ties:
        if value:
            raise PlanError(
                f"{setting} is {value}: it ties clients to each other, and one machine alone has nobody to be tied "
                f"to; set {setting}={off} here, or run the plan with a server"
            )
    if resume is None and checkpoints(directory / "checkpoints"):
        raise ManyhandsError(
            f"{directory} holds checkpoints of an earlier training: resume from it, or choose another directory"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with _Events(directory / "events.jsonl", on_event) as emit, _asked_to_stop() as stop:
        run = _Run(plan, directory, choose_device(device), precision, emit, keep_checkpoints)
        run.open_task(allowed_tasks)
        run.start(resume)
        return run.go(stop)


class _Run:
    """One call of `train`: the state of the loop, in the order in which its methods are called."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        device: torch.device,
        precision: Precision,
        emit: Callable[..., None],
        keep: int,
    ) -> None:
        self.plan, self.directory, self.device, self.precision = plan, directory, device, precision
        self.emit, self.keep = emit, keep
        self.hash = plan_hash(plan)
        self.total_steps = plan.rounds.total * plan.local.steps
        self.cursor = Cursor(step=0, sample=0)
        self.before = math.nan
        self.evaluated: tuple[int, float] | None = None  # at which step, and what
        self.saved: tuple[int, Path] | None = None  # at which step, and where

    def open_task(self, allowed: Collection[str]) -> None:
        """Prepare the materials unless an earlier process did; build model and optimizer."""
        family = family_of(self.plan, allowed=allowed)
        materials = self.directory / "materials"
        done = materials / f"prepared-{self.hash[:16]}"  # written last
        if not done.is_file():
            self.emit("preparing", task=self.plan.task.name)
            prepared = family.prepare(self.plan, materials)
            done.write_text(prepared.first_weights.name + "\n", encoding="utf-8")
        self.first_weights = materials / done.read_text(encoding="utf-8").strip()
        self.task: Task = family.open(self.plan, materials)
        model = self.task.build_model().to(self.device).train()
        optimizer = build_optimizer(self.plan.local.optimizer, model)
        self.training = Training(model=model, optimizer=optimizer, device=self.device)

    def start(self, resume: Path | None) -> None:
        """First weights and seed, or a checkpoint."""
        load_weights(self.training.model, load_file(self.first_weights))
        seed_everything(self.plan.seed)
        self.before = self._evaluate()
        if resume is not None:
            path = find_checkpoint(resume)
            self.cursor = load_checkpoint(path, self.training, plan_hash=self.hash)
            self.evaluated = None
            self.emit("resumed", step=self.cursor.step, checkpoint=str(path))
        parameters = sum(p.numel() for p in self.training.model.parameters())
        self.emit(
            "started",
            plan_hash=self.hash,
            step=self.cursor.step,
            steps=self.total_steps,
            parameters=parameters,
            samples=self.task.samples(),
            unit=self.task.unit,
            device=str(self.device),
            threads=torch.get_num_threads(),
        )

    def go(self, stop: threading.Event) -> TrainResult:
        """All steps that are left, in pieces of local.steps."""
        steps_done, seconds, loss = 0, 0.0, math.nan
        while self.cursor.step < self.total_steps:
            first = self.cursor.step
            started = time.perf_counter()
            loss = self._steps(stop)
            seconds += time.perf_counter() - started
            steps_done += self.cursor.step - first
            if stop.is_set():
                path = self._save()
                self.emit("interrupted", step=self.cursor.step, checkpoint=str(path))
                raise Interrupted(
                    f"interrupted after step {self.cursor.step}; go on with --resume {self.directory}"
                )
            round_ = self.cursor.step // self.plan.local.steps
            last = self.cursor.step == self.total_steps
            if last or self._due(round_):
                self._evaluate()
            if last or round_ % self.plan.rounds.snapshot_every == 0:
                self._save()
        after = self._evaluate()
        tokens = steps_done * self.plan.local.batch_size * self.task.tokens_per_sample()
        result = TrainResult(
            directory=self.directory,
            checkpoint=self._save(),
            steps=self.cursor.step,
            loss=loss,
            validation_loss_before=self.before,
            validation_loss_after=after,
            tokens=tokens,
            seconds=seconds,
            tokens_per_s=tokens / seconds if seconds else 0.0,
        )
        self.emit(
            "finished",
            step=result.steps,
            validation_loss_before=result.validation_loss_before,
            validation_loss_after=after,
            checkpoint=str(result.checkpoint),
            tokens=tokens,
            seconds=round(seconds, 3),
        )
        return result

    def _steps(self, stop: threading.Event) -> float:
        """Up to the end of this piece of local.steps, or until asked to stop; the mean loss of the last
        report.
        """
        plan, batch_size = self.plan, self.plan.local.batch_size
        into = self.cursor.step % plan.local.steps
        rates = learning_rates(plan, self.cursor.step - into)
        steering = Steering(clip_norm=plan.local.optimizer.clip_norm)
        report = _Report(self, batch_size * self.task.tokens_per_sample())
        for rate in rates[into:]:
            sample = self.cursor.sample
            ranges = ranges_between(sample, sample + batch_size, self.task.samples())
            indices = indices_of(ranges, self.task.samples(), plan.seed)
            step = training_step(
                self.task,
                self.training.model,
                [self.task.batch(indices)],
                optimizer=self.training.optimizer,
                learning_rate=rate,
                steering=steering,
                device=self.device,
                precision=self.precision,
            )
            self.cursor = Cursor(step=self.cursor.step + 1, sample=sample + batch_size)
            report.saw(step, rate)
            if stop.is_set():
                break
        return report.write()

    def _due(self, round_: int) -> bool:
        every = self.plan.evaluation.every_snapshots * self.plan.rounds.snapshot_every
        return every > 0 and round_ % every == 0

    def _evaluate(self) -> float:
        """The validation loss at this step, computed once."""
        if self.evaluated is not None and self.evaluated[0] == self.cursor.step:
            return self.evaluated[1]
        evaluation = self.plan.evaluation
        result = evaluate(
            self.task,
            self.training.model,
            evaluation.max_batches,
            self.plan.local.batch_size,
            device=self.device,
            precision=self.precision,
        )
        if not math.isfinite(result.loss):
            raise self.diverged("validation loss", result.loss, self.cursor.step)
        self.evaluated = (self.cursor.step, result.loss)
        self.emit(
            "evaluated",
            step=self.cursor.step,
            loss=result.loss,
            count=result.count,
            samples=result.samples,
            metrics={name: value if math.isfinite(value) else None for name, value in result.metrics.items()},
        )
        return result.loss

    def diverged(self, what: str, value: float, step: int) -> WorkerError:
        return WorkerError(
            f"the {what} is {value} at step {step}: lower local.optimizer.lr, or look at the data; the newest "
            f"checkpoint is in {self.directory / 'checkpoints'}"
        )

    def _save(self) -> Path:
        """The checkpoint of this step, written once."""
        if self.saved is not None and self.saved[0] == self.cursor.step:
            return self.saved[1]
        path = save_checkpoint(
            self.directory / "checkpoints",
            self.training,
            self.cursor,
            plan_hash=self.hash,
            task=self.task,
            keep=self.keep,
        )
        self.saved = (self.cursor.step, path)
        self.emit("saved", step=self.cursor.step, checkpoint=str(path))
        return path


class _Report:
    """Collects steps and emits their mean every LOG_EVERY_STEPS; reading a loss waits for the device."""

    def __init__(self, run: _Run, tokens_per_step: int) -> None:
        self._run, self._tokens_per_step = run, tokens_per_step
        self._steps: list[Step] = []
        self._rate = 0.0
        self._mean = math.nan
        self._since = time.perf_counter()

    def saw(self, step: Step, rate: float) -> None:
        self._steps.append(step)
        self._rate = rate
        if len(self._steps) == LOG_EVERY_STEPS:
            self.write()

    def write(self) -> float:
        """Emit what has come since the last time; raises WorkerError if a loss or a norm is not finite."""
        if not self._steps:
            return self._mean
        losses = torch.stack([step.loss for step in self._steps]).tolist()
        norms = [None if s.gradient_norm is None else float(s.gradient_norm) for s in self._steps]
        first = self._run.cursor.step - len(losses)
        for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
            if not math.isfinite(loss):
                raise self._run.diverged("loss", loss, first + i)
            if norm is not None and not math.isfinite(norm):
                raise self._run.diverged("gradient's norm", norm, first + i)
        now = time.perf_counter()
        self._mean = math.fsum(losses) / len(losses)
        self._run.emit(
            "step",
            step=self._run.cursor.step,
            steps=self._run.total_steps,
            loss=self._mean,
            learning_rate=self._rate,
            gradient_norm=norms[-1],
            tokens_per_s=round(self._tokens_per_step * len(losses) / (now - self._since), 1),
        )
        self._steps.clear()
        self._since = now
        return self._mean


class _Events:
    """Appends events as JSON lines and hands each to a callback."""

    def __init__(self, path: Path, on_event: Callable[[Event], None] | None) -> None:
        self._path, self._on_event = path, on_event

    def __enter__(self) -> Callable[..., None]:
        self._file = self._path.open("a", encoding="utf-8")
        return self._emit

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _emit(self, kind: str, **fields: Any) -> None:
        event: Event = {
            "version": EVENTS_VERSION,
            "time_ms": time.time_ns() // 1_000_000,
            "kind": kind,
            **fields,
        }
        self._file.write(json.dumps(event, allow_nan=False) + "\n")
        self._file.flush()
        if self._on_event is not None:
            self._on_event(event)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; the second one does what it did before. Outside the main thread:
    never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def as_before() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.set()
        as_before()
        name = signal.Signals(number).name
        # Not print: it may have been interrupted in the middle of a print.
        os.write(2, f"{name}: saving after this step; once more to leave at once\n".encode())

    for number in signals:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        as_before()
