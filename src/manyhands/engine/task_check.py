"""Is a task of one's own sound? Asked before a training starts, in a process of its own, which may crash.

    python -m manyhands.engine.task_check PLAN DIRECTORY TARGET

Prepares the materials into DIRECTORY, opens the task from them alone, and does what a training does, once: a batch,
its loss, the gradients, an evaluation, a checkpoint. The first thing that is missing or wrong is said in a sentence
that names the method. Materials that passed stay, so that the training does not prepare them again.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from manyhands.engine.materials import prepared_mark
from manyhands.errors import ManyhandsError, PlanError, WorkerError
from manyhands.plan.compose import load_plan
from manyhands.plan.resolve import dump_plan, plan_hash
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import CustomTask
from manyhands.tasks.protocol import Batch, Loss, Metrics, Prepared, Task, TaskFamily
from manyhands.tasks.registry import family_of

T = TypeVar("T")

METHODS: Final = (
    "build_model",
    "samples",
    "batch",
    "loss",
    "metrics",
    "tokens_per_sample",
    "save_pretrained",
)
ATTRIBUTES: Final = ("unit", "evaluation_sets")
LARGEST_BATCH: Final = 8
"""Samples of the batch that is tried."""


def check_in_process(plan: Plan, directory: Path, target: str) -> None:
    """Check the plan's task in another Python, which prints what is wrong, and leave its materials in `directory`.

    Raises PlanError for a task that is not sound, WorkerError for one that ends the process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "plan.yaml"
        file.write_text(dump_plan(plan), encoding="utf-8")
        command = ["-m", "manyhands.engine.task_check", str(file), str(directory), target]
        code = subprocess.run([sys.executable, *command], check=False).returncode
    if code == PlanError.exit_code:
        raise PlanError(f"the task {target} is not as a training needs it; nothing was started")
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise WorkerError(f"the check of the task {target} ended with {how}; nothing was started")


def check_task(plan: Plan, directory: Path, target: str) -> None:
    """Check the plan's task here. Raises PlanError, naming the method and what was expected of it."""
    try:
        _check(plan, directory, target)
    except _Raised as raised:
        raise PlanError(raised.in_words(target)) from raised.__cause__


def _check(plan: Plan, directory: Path, target: str) -> None:
    family = _called("its import", lambda: family_of(plan, allowed=[target]))
    shutil.rmtree(directory, ignore_errors=True)  # of an earlier check
    prepared = _prepared(family, plan, directory)
    task = _opened(family, plan, prepared, directory)
    model = _model(task, plan, prepared)
    batch = _batch(task, plan)
    _check_loss(task, model, batch)
    _check_evaluations(task, model)
    _check_saving(task, model)
    prepared_mark(directory, plan_hash(plan)).write_text(prepared.first_weights.name + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- the steps
def _prepared(family: TaskFamily, plan: Plan, directory: Path) -> Prepared:
    prepared = _called("prepare(plan, directory)", lambda: family.prepare(plan, directory))
    _expect(isinstance(prepared, Prepared), f"prepare returned {_kind(prepared)}, a Prepared was expected")
    for name, file in prepared.materials.items():
        _expect(
            Path(file).is_file() and Path(file).parent == directory and Path(file).name == name,
            f"prepare names the material {name!r} at {file}: it must be written to directory / name",
        )
    _expect(prepared.samples >= 1, f"prepare counts {prepared.samples} training samples: one is the least")
    first = prepared.first_weights
    _expect(first.parent == directory, f"first_weights is {first}: write it into {directory}")
    try:
        with safe_open(first, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            kinds = {file.get_slice(name).get_dtype() for name in shapes}
    except (OSError, SafetensorError) as error:
        raise PlanError(
            f"prepare: first_weights {first}: {error}; write it by safetensors' save_file"
        ) from error
    _expect(kinds <= {"F32"}, f"first_weights has values of {', '.join(sorted(kinds))}: all must be fp32")
    _same_parameters("first_weights", shapes, prepared)
    return prepared


def _opened(family: TaskFamily, plan: Plan, prepared: Prepared, directory: Path) -> Task:
    """From a directory with the materials alone, as clients of a run have it."""
    place = directory / ".check"
    place.mkdir()
    try:
        for name, file in prepared.materials.items():
            os.symlink(file.resolve(), place / name)
        task = _called(
            "open(plan, materials)",
            lambda: family.open(plan, place),
            hint="it may read nothing but the files that prepare names as materials",
        )
    finally:
        shutil.rmtree(place)
    missing = [f"{name}()" for name in METHODS if not callable(getattr(task, name, None))]
    missing += [name for name in ATTRIBUTES if not hasattr(task, name)]
    _expect(
        not missing, f"open returned {_kind(task)} without {', '.join(missing)} (tasks/protocol.py: Task)"
    )
    _expect(isinstance(task.unit, str), f"unit is {task.unit!r}: a word for what the loss is a mean over")
    sets = task.evaluation_sets
    named = isinstance(sets, tuple | list) and bool(sets) and all(isinstance(name, str) for name in sets)
    _expect(named, f"evaluation_sets is {sets!r}: names were expected, such as ('validation',)")
    counted = _called("samples()", task.samples)
    _expect(
        counted == prepared.samples,
        f"samples() is {counted!r}, and prepare counted {prepared.samples}: both are the training samples",
    )
    tokens = _called("tokens_per_sample()", task.tokens_per_sample)
    _expect(
        isinstance(tokens, int) and tokens >= 1, f"tokens_per_sample() is {tokens!r}: 1 or more was expected"
    )
    return task


def _model(task: Task, plan: Plan, prepared: Prepared) -> torch.nn.Module:
    model = _called("build_model()", task.build_model)
    _expect(isinstance(model, torch.nn.Module), f"build_model returned {_kind(model)}, no torch.nn.Module")
    _same_parameters(
        "build_model()", {name: tuple(p.shape) for name, p in model.named_parameters()}, prepared
    )
    buffers = sorted(
        set(model.state_dict()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    )
    _expect(
        not buffers or plan.buffers == "keep_local",
        f"build_model() has buffers in its state ({buffers[:1]}, {len(buffers)} in all), which no checkpoint keeps "
        "and nobody merges: use layers without (GroupNorm or LayerNorm for BatchNorm)",
    )
    wanted = {entry.name: entry.trainable for entry in prepared.parameters}
    odd = [name for name, p in model.named_parameters() if p.requires_grad != wanted[name]]
    _expect(
        not odd, f"build_model(): {odd[:1]} is frozen in one and trainable in the other of model and prepare"
    )
    return model.train()


def _batch(task: Task, plan: Plan) -> Batch:
    size = min(plan.local.batch_size, LARGEST_BATCH, task.samples())
    batch = _called(f"batch(numpy.arange({size}))", lambda: task.batch(np.arange(size, dtype=np.int64)))
    _check_batch("batch", batch, size)
    return batch


def _check_batch(what: str, batch: Any, size: int) -> None:
    _expect(
        isinstance(batch, Mapping) and bool(batch),
        f"{what} returned {_kind(batch)}: name -> tensor was expected",
    )
    for name, tensor in batch.items():
        _expect(isinstance(tensor, torch.Tensor), f"{what}: {name!r} is {_kind(tensor)}, no torch.Tensor")
        _expect(tensor.device.type == "cpu", f"{what}: {name!r} is on {tensor.device}: the CPU was expected")
        shape = tuple(tensor.shape)
        _expect(
            bool(shape) and shape[0] == size,
            f"{what}: {name!r} has the shape {shape} for {size} samples: the first dimension must be {size}",
        )


def _check_loss(task: Task, model: torch.nn.Module, batch: Batch) -> None:
    loss = _called("loss(model, batch)", lambda: task.loss(model, batch))
    _is_loss("loss", loss)
    _expect(
        loss.mean.requires_grad,
        "loss: mean has no gradient: compute it with torch from the model's outputs, without detach or item",
    )
    _called("loss(...).mean.backward()", loss.mean.backward)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    reached = {name: p.grad for name, p in trainable.items() if p.grad is not None}
    _expect(
        bool(reached),
        "loss: its gradient reaches no parameter of the model that it was given: call that model",
    )
    broken = [name for name, gradient in reached.items() if not torch.isfinite(gradient).all()]
    _expect(not broken, f"loss: the gradient of {broken[:1]} is not finite at the first weights")


def _is_loss(what: str, loss: Any) -> None:
    _expect(isinstance(loss, Loss), f"{what} returned {_kind(loss)}: Loss(mean=..., count=...) was expected")
    _expect(
        isinstance(loss.mean, torch.Tensor),
        f"{what}: mean is {_kind(loss.mean)}, a torch.Tensor was expected",
    )
    shape = tuple(loss.mean.shape)
    _expect(shape == (), f"{what}: mean has the shape {shape}: one number was expected, as .mean() gives it")
    value = float(loss.mean.detach())
    _expect(
        math.isfinite(value), f"{what}: mean is {value} on the first samples: look at the data and the model"
    )
    _expect(
        isinstance(loss.count, int) and loss.count >= 1,
        f"{what}: count is {loss.count!r}: of how many it is the mean, a whole number, was expected",
    )


def _check_evaluations(task: Task, model: torch.nn.Module) -> None:
    for split in task.evaluation_sets:
        total = _called(f"samples({split!r})", partial(task.samples, split))
        _expect(isinstance(total, int) and total >= 1, f"samples({split!r}) is {total!r}: one is the least")
        indices = np.arange(min(total, LARGEST_BATCH), dtype=np.int64)
        batch = _called(f"batch(indices, {split!r})", partial(task.batch, indices, split))
        _check_batch(f"batch(indices, {split!r})", batch, len(indices))
        metrics = _called(f"metrics({split!r})", partial(task.metrics, split))
        model.eval()
        with torch.no_grad():
            loss = _called("metrics(...).add(model, batch)", partial(metrics.add, model, batch))
        model.train()
        _is_loss("metrics(...).add", loss)
        _called("metrics(...).merge([state()])", partial(_merged, metrics))
        values = _called("metrics(...).values()", metrics.values)
        odd = {name: v for name, v in values.items() if not isinstance(v, int | float)}
        _expect(not odd, f"metrics({split!r}).values() has {odd}: numbers were expected")


def _merged(metrics: Metrics) -> None:
    metrics.merge([metrics.state()])


def _check_saving(task: Task, model: torch.nn.Module) -> None:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with tempfile.TemporaryDirectory() as place:
        _called("save_pretrained(weights, directory)", lambda: task.save_pretrained(weights, Path(place)))
        _expect(
            any(Path(place).iterdir()), "save_pretrained wrote nothing into the directory that it was given"
        )


# ------------------------------------------------------------------------------------------- words
def _same_parameters(what: str, shapes: Mapping[str, tuple[int, ...]], prepared: Prepared) -> None:
    wanted = {entry.name: tuple(entry.shape) for entry in prepared.parameters}
    for name in sorted(shapes.keys() | wanted.keys()):
        _expect(
            shapes.get(name) == wanted.get(name),
            f"{what} has {name!r} as {shapes.get(name, 'nothing')}, and Prepared.parameters as "
            f"{wanted.get(name, 'nothing')}: names and shapes must be those of build_model().named_parameters()",
        )


class _Raised(Exception):
    """Out of the user's code, which is its cause."""

    def __init__(self, what: str, error: Exception, hint: str) -> None:
        super().__init__(what)
        self._what, self._error, self._hint = what, error, hint

    def in_words(self, target: str) -> str:
        """With its place: the line of the task's own file that led there, if one did."""
        trace = list(traceback.walk_tb(self._error.__traceback__))
        own = [each for each in trace if each[0].f_globals.get("__name__") == target.partition(":")[0]]
        frame, line = (own or trace)[-1]
        place = f"({frame.f_code.co_filename}, line {line})"
        hint = f"; {self._hint}" if self._hint else ""
        return f"{self._what} raised {type(self._error).__name__}: {self._error} {place}{hint}"


def _called(what: str, call: Callable[[], T], hint: str = "") -> T:
    """The boundary to the user's code: whatever it raises becomes one of our errors."""
    try:
        return call()
    except ManyhandsError:
        raise
    except Exception as error:
        raise _Raised(what, error, hint) from error


def _expect(sound: bool, otherwise: str) -> None:
    if not sound:
        raise PlanError(otherwise)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


@contextmanager
def _told(target: str) -> Iterator[None]:
    try:
        yield
    except ManyhandsError as error:
        print(f"error: task {target}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def main() -> None:
    plan_file, directory, target = sys.argv[1:]
    with _told(target):
        plan = load_plan(plan_file)
        assert isinstance(plan.task, CustomTask)
        check_task(plan, Path(directory).resolve(), target)


if __name__ == "__main__":
    main()
