"""Checkpoints: what a person keeps, and for a training on one machine also what exact resume needs.

    checkpoints/
        latest                      the name of the newest one, for people and scripts
        step-00000300/
            training.json           version, plan hash, step, data cursor
            state/*.safetensors     weights/<parameter>, optimizer/<key>/<parameter>, of what is trained: one file,
                                    or where the model is sharded one of each process (torch.distributed.checkpoint)
            ...                     the task's own form (language model: what transformers loads)
        round-00000012/             of a networked run: the task's own form of public after 12 closings

Invariants: a checkpoint is written aside, synced and renamed, so a directory named step-* or round-* is whole; a
kill at any moment loses at most the one being written. The newest is the one with the highest number, whatever
`latest` says; whoever goes on from an older one sets the newer ones aside first (aside/), so that all that are there
are of one course. An older one is removed only after a newer one is complete. Nothing is pickled. The generators need
no place here: they are seeded at every step. Any number of processes can go on from what another number has saved.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from manyhands.config.checkpoint_names import RUN, TRAINING, name_of
from manyhands.engine.kept_checkpoints import (
    RECORD,
    VERSION,
    check_plan_of,
    checkpoints,
    find_checkpoint,
    others_in_words,
    point_to,
    remove,
)
from manyhands.engine.optimizer import create_state
from manyhands.engine.sharding import whole
from manyhands.engine.world import ALONE, World
from manyhands.errors import PlanError, StorageError
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan
from manyhands.storage.durable import sync
from manyhands.tasks.protocol import Task

_APPEARS_S = 15.0  # network file systems show another machine's new file late
STATE = "state"

_PARTIAL = re.compile(r"^\.(step|round)-\d{8,}\.partial-\d+$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where a training stands. `sample` counts the samples drawn so far over all epochs."""

    step: int
    sample: int
    first_loss: float | None = None  # on the main evaluation set, before the first step


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What is saved, and restored in place. The tensors of both may be sharded over `world`."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    world: World = ALONE

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the model and the optimizer themselves, by their names in a checkpoint.

        Parameters that are not trained are left out: they are those of the first weights, which a resume loads first.
        """
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        tensors = {f"weights/{name}": p.detach() for name, p in trained.items()}
        for name, parameter in trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value.detach()
        return tensors


class Saver:
    """Writes checkpoints of one training; asynchronously, the next save waits for the last one.

    All ranks call the same methods in the same order; rank 0 gives a checkpoint its name.
    """

    def __init__(
        self, directory: Path, task: Task, *, plan: Plan, keep: int = 2, asynchronous: bool = False
    ) -> None:
        self._directory, self._task, self._plan_hash, self._keep = directory, task, plan_hash(plan), keep
        self._asynchronous = asynchronous
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: tuple[Path, Future[None]] | None = None

    def check_place(self, training: Training) -> None:
        """Raises PlanError on every rank where the parts of a sharded model would go to directories of their own."""
        world = training.world
        if not any(isinstance(parameter, DTensor) for parameter in training.model.parameters()):
            return
        mark = self._directory / f".all-see-{world.told(os.getpid())}"
        if world.leads:
            try:
                _make_room(self._directory)
                mark.touch()
            except OSError as error:
                raise _not_written(mark, error) from error
        world.barrier()
        blind = world.any(not _appears(mark))
        if world.leads:
            mark.unlink(missing_ok=True)
        if blind:
            raise PlanError(
                f"a model that is divided among processes is saved by all of them into one directory, and not all "
                f"see rank 0's {self._directory}: give a --directory that all machines share, or train with "
                "parallel.strategy=ddp"
            )

    def save(self, training: Training, cursor: Cursor) -> Path:
        """Take the checkpoint of `cursor.step` and write it, then remove all but the newest `keep`.

        A checkpoint of that step which is already there is kept as it is: with as many processes it is the same.
        Returns where it will be; `written` tells when it is. Raises StorageError if the disk did not take the one
        before; what was there before is then untouched.
        """
        self.written(wait=True)
        path = self._directory / name_of(TRAINING, cursor.step)
        if training.world.told(path.is_dir()):
            if training.world.leads:
                point_to(self._directory, path.name)
            write: Callable[[], None] = _nothing
        else:
            write = self._staged(training, cursor, path.name)
        self._last = path, self._writer.submit(write)
        return path

    def written(self, *, wait: bool = False) -> Path | None:
        """The checkpoint that has come to be on the disk since this was asked last, if there is one.

        wait: until the last save has ended, as every call does where saves are not asynchronous. Raises StorageError
        if the disk does not take it.
        """
        if self._last is None or not (wait or not self._asynchronous or self._last[1].done()):
            return None
        (path, last), self._last = self._last, None
        last.result()
        return path

    def close(self) -> None:
        """Wait for the last save, whatever came of it, and end the thread."""
        self._writer.shutdown()

    def _staged(self, training: Training, cursor: Cursor, name: str) -> Callable[[], None]:
        """Copies of everything, so that training can go on; and what writes them, for the thread."""
        world = training.world
        weights = _whole_weights(training.model, world)
        record = {
            "version": VERSION,
            "plan_hash": self._plan_hash,
            "step": cursor.step,
            "sample": cursor.sample,
            "first_loss": cursor.first_loss,
            "ranks": world.size,
        }
        tensors = training.tensors()
        if any(isinstance(tensor, DTensor) for tensor in tensors.values()):
            return self._staged_shards(world, tensors, weights, record, name)
        if not world.leads:
            return _nothing
        copied = {f"weights/{name}": tensor for name, tensor in weights.items()}
        state = {
            key: copied[key] if key in copied else tensor.to("cpu", copy=True)
            for key, tensor in tensors.items()
        }

        def fill(partial: Path) -> None:
            (partial / STATE).mkdir()
            save_file(state, partial / STATE / "state.safetensors")
            self._write_rest(partial, weights, record)

        return lambda: self._finish(name, fill)

    def _staged_shards(
        self,
        world: World,
        tensors: dict[str, torch.Tensor],
        weights: dict[str, torch.Tensor],
        record: dict[str, Any],
        name: str,
    ) -> Callable[[], None]:
        """As `_staged`, where each process writes its part, to a directory that all of them see."""
        aside = self._directory / f".{name}.partial-{world.told(os.getpid())}"
        if world.leads:
            try:
                _make_room(self._directory)
                (aside / STATE).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _not_written(self._directory / name, error) from error
        world.barrier()
        writer = HuggingFaceStorageWriter(str(aside / STATE), save_distributed=True)
        saved = async_save(tensors, storage_writer=writer, process_group=world.background)
        assert isinstance(saved, Future)

        def write() -> None:
            try:
                saved.result()
            except (
                CheckpointException
            ) as error:  # no Exception by its class; what failed on each rank is in it
                first = next(iter(error.failures.values()))[0]
                raise _not_written(self._directory / name, first) from error
            except (OSError, SafetensorError, RuntimeError) as error:
                raise _not_written(self._directory / name, error) from error
            if world.leads:
                self._finish(name, lambda partial: self._write_rest(partial, weights, record), aside)

        return write

    def _write_rest(self, partial: Path, weights: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
        self._task.save_pretrained(weights, partial)
        (partial / RECORD).write_text(json.dumps(record, sort_keys=True) + "\n", encoding="utf-8")

    def _finish(self, name: str, fill: Callable[[Path], None], partial: Path | None = None) -> None:
        _write_aside(self._directory, name, fill, partial)
        others = [
            path for path in checkpoints(self._directory) if path.name != name
        ]  # never the one just written
        try:
            for old in others[: len(others) - (self._keep - 1)]:
                remove(old)
        except OSError as error:
            raise StorageError(f"old checkpoint {old}: {error}; remove it by hand") from error


def _nothing() -> None:
    """For a rank that writes nothing."""


def _whole_weights(model: torch.nn.Module, world: World) -> dict[str, torch.Tensor]:
    """Copies of the parameters on the CPU of rank 0, whole; all ranks take part where they are sharded."""
    weights = {}
    for name, parameter in model.named_parameters():
        tensor = whole(parameter.detach())
        if world.leads:
            weights[name] = tensor.to("cpu", copy=True).contiguous()
    return weights


def publish(task: Task, model: torch.nn.Module, directory: Path, round_number: int) -> Path:
    """Write what a person keeps of a networked run: the task's form of public after `round_number` closings.

    One that is already there is kept: public at a round never changes. Raises StorageError.
    """
    name = name_of(RUN, round_number)
    _write_aside(directory, name, lambda partial: task.save_pretrained(weights_of(model), partial))
    return directory / name


def _write_aside(
    directory: Path, name: str, write: Callable[[Path], None], partial: Path | None = None
) -> None:
    """Let `write` fill a directory that then appears at once under `name`, and point `latest` to it.

    partial: that directory, where something is in it already.
    """
    aside = partial or directory / f".{name}.partial-{os.getpid()}"
    try:
        if partial is None:
            _make_room(directory)
        if not (directory / name).is_dir():
            aside.mkdir(exist_ok=partial is not None)
            write(aside)
            for file in sorted(aside.rglob("*")):
                sync(file)
            sync(aside)
            aside.rename(directory / name)
            sync(directory)
        point_to(directory, name)
    except (OSError, SafetensorError) as error:  # a full disk meets the one or the other
        shutil.rmtree(aside, ignore_errors=True)
        raise _not_written(directory / name, error) from error


def _appears(file: Path) -> bool:
    """Whether it is there, or comes to be in time."""
    end = time.monotonic() + _APPEARS_S
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _not_written(path: Path, error: BaseException) -> StorageError:
    return StorageError(f"checkpoint {path}: {error}; free space and try again")


def load_checkpoint(path: Path, training: Training, plan: Plan) -> Cursor:
    """Restore model and optimizer from a checkpoint, to the last bit, whatever number of processes saved it.

    `path` is a checkpoint or a directory of them (then the newest). Raises StorageError for one that is missing or
    broken, Refused for one of another plan; the model may then be partly overwritten, the files never are.
    """
    path = find_checkpoint(path)
    record = check_plan_of(path, plan)
    reader = HuggingFaceStorageReader(str(path / STATE))
    try:
        saved = set(reader.read_metadata().state_dict_metadata)
        create_state(training.optimizer)
        for (
            name,
            parameter,
        ) in training.model.named_parameters():  # one that never had a gradient has no state
            if not any(
                f"optimizer/{key}/{name}" in saved for key in training.optimizer.state.get(parameter, {})
            ):
                training.optimizer.state.pop(parameter, None)
        wanted = training.tensors()
        if wanted.keys() != saved:
            odd = min(wanted.keys() ^ saved)
            side = "model" if odd in wanted else "checkpoint"
            raise StorageError(
                f"checkpoint {path}: {odd!r} is only in the {side}; resume with the program and the plan it was made "
                "with"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it should be
            load(wanted, storage_reader=reader, no_dist=training.world.size == 1)
    except (OSError, SafetensorError, ValueError, KeyError, CheckpointException) as error:
        raise StorageError(f"checkpoint {path / STATE}: {error}; {others_in_words(path)}") from error
    return Cursor(step=record["step"], sample=record["sample"], first_loss=record.get("first_loss"))


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters by name, on the CPU; not copied where they are there already."""
    return {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}


def _make_room(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)


def _sweep(directory: Path) -> None:
    """Remove what a killed save left behind. Only one process trains in a directory."""
    for entry in directory.iterdir():
        if _PARTIAL.match(entry.name):
            shutil.rmtree(entry)
