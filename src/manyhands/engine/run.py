"""`train`: a plan's task on devices of one's own, from the first weights or from a checkpoint to the last step.

The same task, step, optimizer, schedule and order of data as in a networked run, without rounds: rounds.total *
local.steps optimizer steps. One process, or several that share each step's samples or the model; all of them run this
same loop. Every step's generators are seeded from the plan, the step and the data rank: a checkpoint need not hold
them, and any number of processes can go on from it.

    <directory>/materials/      what the task prepared, made once
    <directory>/checkpoints/    engine/checkpoint.py
    <directory>/pictures/       predictions, of tasks that draw them
    <directory>/events.jsonl    engine/events.py; written by rank 0
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file

from manyhands.config.checkpoint_names import number_of
from manyhands.coordination.schedule import learning_rates
from manyhands.engine.checkpoint import Cursor, Saver, Training, load_checkpoint
from manyhands.engine.device import share_threads
from manyhands.engine.evaluation import Evaluations
from manyhands.engine.events import Event, Events
from manyhands.engine.faults import check_trainable, in_words
from manyhands.engine.flops import training_flops
from manyhands.engine.kept_checkpoints import find_checkpoint, newest_in_words, set_aside
from manyhands.engine.loading import made_ahead, micro_batches, step_indices
from manyhands.engine.loggers import logging_to
from manyhands.engine.materials import hash_of, prepare, prepared_mark
from manyhands.engine.optimizer import build_optimizer
from manyhands.engine.parallel import Parallelized, parallelize
from manyhands.engine.report import Report, optimizer_stats
from manyhands.engine.settings import EngineSettings
from manyhands.engine.step import Steering, training_step
from manyhands.engine.stopping import Stop, asked_to_stop
from manyhands.engine.trainer import load_weights
from manyhands.engine.world import ALONE, Place, World, device_of, enter_world, met
from manyhands.errors import Interrupted, NotFinite
from manyhands.plan.resolve import agreed, plan_hash
from manyhands.plan.schema import Plan
from manyhands.storage.lock import take_lock
from manyhands.tasks.protocol import Batch, Task, Warns
from manyhands.tasks.registry import family_of
from manyhands.updates.seeds import seed_generators, seed_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What came of a training. Losses are in the task's own unit, validation losses over the same samples."""

    directory: Path
    checkpoint: Path
    steps: int
    loss: float  # mean training loss since the last report
    validation_loss_before: float
    validation_loss_after: float
    tokens: int  # of all processes, without what an earlier start did
    seconds: float  # of training, without preparation and evaluation
    tokens_per_s: float
    unit: str  # the task's name of what is counted as tokens: pixels, positions, samples, ...


def train(
    plan: Plan,
    directory: Path,
    *,
    settings: EngineSettings = EngineSettings(),  # noqa: B008 - frozen
    resume: Path | None = None,
    place: Place = Place(),  # noqa: B008 - frozen
    on_event: Callable[[Event], None] | None = None,
    on_stop: Callable[[str], None] | None = None,
    allowed_tasks: Collection[str] = (),
) -> TrainResult:
    """Train and return what came of it; checkpoints and events are in `directory`, which all processes see.

    `resume`: a checkpoint, or a directory that holds some (then the newest): goes on exactly where it was. `place`:
    this process's among several, each of which calls this with the same arguments. SIGINT and SIGTERM finish the
    step, save and raise Interrupted; a second one ends at once. `on_stop` is told what the first one leads to, else
    standard error. Raises PlanError, DataError, Refused (a checkpoint of
    another plan), StorageError, WorkerError (the loss is not finite, memory is exhausted, a rank is missing).
    """
    check_trainable(plan, place, directory, resume, settings)
    world = ALONE
    with ExitStack() as stack:
        if place.leads:
            stack.enter_context(
                take_lock(directory, "It trains there: wait for its end, or choose another directory.")
            )
        stop = stack.enter_context(asked_to_stop(quiet=not place.leads, tell=on_stop))
        try:
            place = met(place)
            device = device_of(place, settings.exec.device)
            share_threads(settings.exec.threads, place.local_size)
            world = stack.enter_context(
                enter_world(place, device, settings.parallel, timeout_s=settings.exec.rank_timeout_s)
            )
            world.check_alike("plan", agreed(plan).model_dump(mode="json"))
            world.check_alike("engine's settings", settings.common())
            sinks = [on_event] if on_event is not None and world.leads else []
            events = stack.enter_context(Events(directory / "events.jsonl" if world.leads else None, sinks))
            if world.leads:
                stack.enter_context(logging_to(events, settings.logging, plan, directory))
            run = _Run(plan, directory, settings, world, events, resume)
            stack.callback(run.close)
            stop.outlook = run.outlook
            run.open_task(allowed_tasks)
            try:
                run.start()
                return run.go(stop)
            except NotFinite as error:
                raise run.ended_by(error) from None
        except RuntimeError as error:
            told = in_words(error, place, world.missing_after(error))
            if told is None:
                raise
            raise told from error


class _Run:
    """One call of `train`: the state of the loop, in the order in which its methods are called."""

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        settings: EngineSettings,
        world: World,
        events: Events,
        resume: Path | None,
    ) -> None:
        self.plan, self.directory, self.settings, self.world = plan, directory, settings, world
        self.emit, self.resume = events.emit, resume
        self.hash = plan_hash(plan)
        self.total_steps = plan.rounds.total * plan.local.steps
        self.cursor = Cursor(step=0, sample=0)
        self.saved: tuple[int, Path] | None = None  # at which step, and where
        self.kept_step: int | None = None  # of the newest checkpoint
        self.activity: Literal["preparation", "training", "evaluation"] = "preparation"
        self.saver: Saver | None = None

    def outlook(self) -> str:
        """What a signal leads to, for the person who has sent it."""
        kept = "no step is saved yet" if self.kept_step is None else f"saved so far: step {self.kept_step}"
        if self.activity != "training":
            return f"saving and leaving after the {self.activity} that is under way ({kept})"
        steps = 1 if self.world.size == 1 else self.settings.logging.every_steps - self.report.pending()
        pace_s = self.report.step_s()
        when = "" if pace_s is None else f", in about {max(0.1, steps * pace_s):.1f} s"
        return f"saving and leaving by step {self.cursor.step + steps}{when} ({kept})"

    def close(self) -> None:
        if self.saver is not None:
            self.saver.close()

    def ended_by(self, error: NotFinite) -> NotFinite:
        """With what is kept, once all of it is written; on all ranks, so that none of them ends another over it."""
        self.close()
        with suppress(RuntimeError):  # a rank that has gone is not the reason
            self.world.barrier()
        return NotFinite(f"{error}; {newest_in_words(self.directory / 'checkpoints')}")

    def open_task(self, allowed: Collection[str]) -> None:
        """Prepare the materials unless an earlier process did; build model and optimizer."""
        family = family_of(self.plan, allowed=allowed)
        materials = self.directory / "materials"
        done = prepared_mark(materials, self.hash)
        for turn in (
            self.world.leads,
            self.world.leads_here,
        ):  # on other machines only if they do not see these
            if turn and not done.is_file():
                self.emit("preparing", task=self.plan.task.name)
                prepare(family, self.plan, materials)
            self.world.wait_for_leader()
        self.task: Task = family.open(self.plan, materials)
        for text in self.task.warnings if isinstance(self.task, Warns) else ():
            self.emit("warning", text=text)
        first_weights = materials / done.read_text(encoding="utf-8").strip()
        self.world.check_alike("materials", (self.task.samples(), hash_of(first_weights)))
        model = self.task.build_model()
        load_weights(model, load_file(first_weights))
        model = model.train()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.flops = self._flops(model)
        if self.settings.exec.precision == "pure_bf16":
            model = model.to(torch.bfloat16)
        self.parallelized: Parallelized = parallelize(model, self.world, self.settings)
        optimizer = build_optimizer(self.plan.local.optimizer, model)
        self.training = Training(model=model, optimizer=optimizer, world=self.world)
        self.saver = Saver(
            self.directory / "checkpoints",
            self.task,
            plan=self.plan,
            keep=self.settings.checkpoints.keep,
            asynchronous=self.settings.checkpoints.asynchronous,
        )
        self.saver.check_place(self.training)
        self.evaluations = Evaluations(
            self.task,
            model,
            self.plan,
            self.settings,
            world=self.world,
            emit=self.emit,
            directory=self.directory,
        )

    def start(self) -> None:
        """From the first weights, which are evaluated, or from a checkpoint."""
        seed_generators(self.plan.seed)
        self._go_on()
        if self.cursor.first_loss is None:
            self.cursor = replace(self.cursor, first_loss=self._evaluate())
        self.emit(
            "started",
            plan_hash=self.hash,
            step=self.cursor.step,
            steps=self.total_steps,
            parameters=self.parameters,
            samples=self.task.samples(),
            unit=self.task.unit,
            device=str(self.world.device),
            processes=self.world.size,
            threads=torch.get_num_threads(),
            hosts=self._hosts(),
        )
        self.report = Report(
            emit=self.emit,
            world=self.world,
            total_steps=self.total_steps,
            samples_per_step=self.plan.local.batch_size,
            tokens_per_step=self.plan.local.batch_size * self.task.tokens_per_sample(),
            unit=self.task.unit,
            flops_per_step=self.flops,
        )

    def _go_on(self) -> None:
        """From the checkpoint that rank 0 finds, if it is to resume: another rank may see others, or none."""
        resume = self.resume if self.world.leads else None
        found = self.world.told(None if resume is None else str(find_checkpoint(resume)))
        if found is None:
            return
        self.cursor = load_checkpoint(Path(found), self.training, self.plan)
        self.kept_step = self.cursor.step
        self.emit("resumed", step=self.cursor.step, checkpoint=found)
        if not self.world.leads:
            return
        if moved := set_aside(self.directory / "checkpoints", Path(found), self.cursor.step):
            self.emit("set_aside", step=self.cursor.step, checkpoints=[str(path) for path in moved])

    def go(self, stop: Stop) -> TrainResult:
        """All steps that are left, in pieces of local.steps."""
        while self.cursor.step < self.total_steps:
            if self._steps(stop):
                self.report.write()
                path = self._save(whole=True)
                self.emit("interrupted", step=self.cursor.step, checkpoint=str(path))
                raise Interrupted(
                    f"interrupted after step {self.cursor.step}, which is saved in {path}; go on with --resume "
                    f"{self.directory}"
                )
            round_ = self.cursor.step // self.plan.local.steps
            last = self.cursor.step == self.total_steps
            evaluated = last or self._due(round_)
            saved = last or round_ % self.plan.rounds.snapshot_every == 0
            if evaluated or saved:  # so a loss that is not finite is found before
                self.report.write()
            if evaluated:
                self._evaluate()
            if saved:
                self._save()
        return self._finished()

    def _finished(self) -> TrainResult:
        report, after = self.report, self._evaluate()
        result = TrainResult(
            directory=self.directory,
            checkpoint=self._save(whole=True),
            steps=self.cursor.step,
            loss=report.loss,
            validation_loss_before=self.cursor.first_loss if self.cursor.first_loss is not None else math.nan,
            validation_loss_after=after,
            tokens=report.tokens,
            seconds=report.seconds,
            tokens_per_s=report.tokens / report.seconds if report.seconds else 0.0,
            unit=self.task.unit,
        )
        self.emit(
            "finished",
            step=result.steps,
            validation_loss_before=result.validation_loss_before,
            validation_loss_after=after,
            checkpoint=str(result.checkpoint),
            tokens=result.tokens,
            seconds=round(result.seconds, 3),
        )
        return result

    def _hosts(self) -> list[str]:
        """Names of the machines that train, in the order of their data ranks."""
        gathered = self.world.gather_data({"host": platform.node()})
        return list(dict.fromkeys(each["host"] for each in gathered))

    # --------------------------------------------------------------------------------------- steps
    def _steps(self, stop: Stop) -> bool:
        """Up to the end of this piece of local.steps; True if asked to stop before."""
        if self._stopping(stop, due=True):
            return True
        self.activity = "training"
        plan, logging = self.plan, self.settings.logging
        first = self.cursor.step
        into = first % plan.local.steps
        rates = learning_rates(plan, first - into)[into:]
        self.report.start()
        batches = made_ahead(self._batches(len(rates)), self.world.device)
        for rate, batch in zip(rates, batches, strict=True):
            self._step(batch, rate)
            self._tell_saved()
            due = self.report.pending() >= logging.every_steps
            if due:
                self.report.write()
            if logging.optim_stats_steps and self.cursor.step % logging.optim_stats_steps == 0:
                self.emit("optimizer_stats", step=self.cursor.step, tensors=self._stats())
            if self._stopping(stop, due):
                return True
        return self._stopping(stop, due=True)

    def _step(self, batches: Sequence[Batch], rate: float) -> None:
        step, execution, world = self.cursor.step, self.settings.exec, self.world
        seed_generators(seed_of(self.plan.seed, step, world.data_rank))
        taken = training_step(
            self.task,
            self.parallelized,
            batches,
            optimizer=self.training.optimizer,
            learning_rate=rate,
            steering=Steering(clip_norm=self.plan.local.optimizer.clip_norm),
            world=world,
            precision=execution.precision,
            reference_count=self._reference_count() if world.data_size > 1 else None,
            fp32_sum=execution.precision == "pure_bf16" and execution.accumulate_in_fp32 and len(batches) > 1,
            skip_nonfinite=execution.on_nonfinite == "skip",
        )
        self.cursor = replace(
            self.cursor, step=step + 1, sample=self.cursor.sample + self.plan.local.batch_size
        )
        self.report.saw(self.cursor.step, taken, rate)

    def _batches(self, steps: int) -> Iterator[list[Batch]]:
        """This rank's of so many steps from here on."""
        batch_size, size = self.plan.local.batch_size, self.settings.parallel.micro_batch_size
        sample = self.cursor.sample
        parts = step_indices(self.task, sample, batch_size, steps, self.plan.seed, self.world)
        return (micro_batches(self.task, indices, size) for indices in parts)

    def _reference_count(self) -> int:
        """The count of a full micro-batch, where every sample counts for all its tokens."""
        share = self.plan.local.batch_size // self.world.data_size
        return min(share, self.settings.parallel.micro_batch_size or share) * self.task.tokens_per_sample()

    def _stopping(self, stop: Stop, due: bool) -> bool:
        """Whether to stop after this step. Several processes agree on it, now and then: it waits for all."""
        if self.world.size == 1:
            return stop.is_set()
        if not due:
            return False
        asked = torch.tensor(float(stop.is_set()), device=self.world.device)
        return bool(self.world.largest(asked))

    def _flops(self, model: torch.nn.Module) -> int | None:
        """Of a step on all devices; counted only where MFU is known."""
        flops = training_flops(self.task, model) if self.world.device.type == "cuda" else None
        return None if flops is None else flops * self.plan.local.batch_size

    # --------------------------------------------------------------------------------------- now and then
    def _due(self, round_: int) -> bool:
        every = self.plan.evaluation.every_snapshots * self.plan.rounds.snapshot_every
        return every > 0 and round_ % every == 0

    def _stats(self) -> dict[str, dict[str, float]]:
        return optimizer_stats(self.training.model, self.training.optimizer)

    def _evaluate(self) -> float:
        self.activity = "evaluation"
        return self.evaluations.loss(self.cursor.step)

    def _save(self, *, whole: bool = False) -> Path:
        """The checkpoint of this step, written once. whole: on return it is there."""
        assert self.saver is not None
        if self.saved is None or self.saved[0] != self.cursor.step:
            self._tell_saved(wait=True)  # the one before
            self.saved = (self.cursor.step, self.saver.save(self.training, self.cursor))
        self._tell_saved(wait=whole)
        return self.saved[1]

    def _tell_saved(self, *, wait: bool = False) -> None:
        """If a checkpoint has come to be on the disk."""
        assert self.saver is not None
        path = self.saver.written(wait=wait)
        if path is not None:
            self.kept_step = number_of(path)
            self.emit("saved", step=self.kept_step, checkpoint=str(path))
