from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from manyhands.engine import checkpoint
from manyhands.engine.checkpoint import (
    Cursor,
    Saver,
    Training,
    load_checkpoint,
    publish,
)
from manyhands.engine.kept_checkpoints import RECORD, checkpoints, find_checkpoint
from manyhands.engine.optimizer import build_optimizer, state_of
from manyhands.engine.parallel import Parallelized
from manyhands.engine.step import Step, training_step
from manyhands.engine.world import ALONE
from manyhands.errors import Refused, StorageError
from manyhands.plan.fine_tuning import Adapter
from manyhands.plan.resolve import PLAN_FILE, dump_plan, plan_hash
from manyhands.plan.schema import Data, Plan

STATE_FILE = f"{checkpoint.STATE}/state.safetensors"


def take_step(task: Any, model: torch.nn.Module, batches: Any, **more: Any) -> Step:
    """On one device."""
    return training_step(task, Parallelized.whole(model), batches, **more)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, also no handler of Exception."""


def training_of(world: Any, steps: int = 2) -> Training:
    task = world.task()
    torch.manual_seed(3)
    model = task.build_model()
    optimizer = build_optimizer(world.plan.local.optimizer, model)
    for i in range(steps):
        training_step(
            task,
            Parallelized.whole(model),
            [task.batch(np.arange(4) + i)],
            optimizer=optimizer,
            learning_rate=1e-2,
        )
    return Training(model=model, optimizer=optimizer)


def contents(training: Training) -> dict[str, torch.Tensor]:
    weights = {name: p.detach().clone() for name, p in training.model.named_parameters()}
    return weights | state_of(training.optimizer, training.model)


def save(world: Any, directory: Path, step: int, training: Training | None = None, **more: Any) -> Path:
    training = training or training_of(world)
    cursor = Cursor(step=step, sample=step * 4)
    saver = Saver(directory, world.task(), plan=world.plan, **more)
    try:
        path = saver.save(training, cursor)
        assert saver.written(wait=True) == path
        return path
    finally:
        saver.close()


def test_everything_comes_back(world: Any, tmp_path: Path, same: Any) -> None:
    training = training_of(world)
    saved = contents(training)
    path = save(world, tmp_path, 12, training)

    other = training_of(world, steps=1)
    assert not same(contents(other), saved)
    assert load_checkpoint(path, other, world.plan) == Cursor(step=12, sample=48)
    assert same(contents(other), saved)


def test_what_is_not_trained_is_not_in_the_state(world: Any, tmp_path: Path, same: Any) -> None:
    model = world.task().build_model()
    frozen, first = next(iter(model.named_parameters()))
    first.requires_grad_(False)
    optimizer = build_optimizer(world.plan.local.optimizer, model)
    take_step(
        world.task(), model, [world.task().batch(np.arange(4))], optimizer=optimizer, learning_rate=1e-2
    )
    training = Training(model=model, optimizer=optimizer)
    path = save(world, tmp_path, 12, training)
    assert not any(key.endswith(f"/{frozen}") for key in load_file(path / STATE_FILE))
    assert load_file(path / "model.safetensors"), "what a person keeps is whole"
    expected = contents(training)
    with torch.no_grad():
        for parameter in training.model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    load_checkpoint(path, training, world.plan)
    assert same(contents(training), expected)


def test_a_parameter_that_never_had_a_gradient_comes_back_too(world: Any, tmp_path: Path, same: Any) -> None:
    model = world.task().build_model()
    model.spare = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(world.plan.local.optimizer, model)
    take_step(
        world.task(), model, [world.task().batch(np.arange(4))], optimizer=optimizer, learning_rate=1e-2
    )
    training = Training(model=model, optimizer=optimizer)
    expected = contents(training)
    saver = Saver(tmp_path, _Silent(), plan=world.plan)
    path = saver.save(training, Cursor(step=1, sample=4))
    saver.close()
    load_checkpoint(path, training, world.plan)
    assert same(contents(training), expected)


class _Silent:
    def save_pretrained(self, weights: Any, directory: Path) -> None:
        """Nothing that a person keeps."""


def test_what_a_person_keeps_is_in_the_same_directory(world: Any, tmp_path: Path) -> None:
    path = save(world, tmp_path, 12)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}
    assert not list(path.rglob("*.bin")) + list(path.rglob("*.pt")) + list(path.rglob("*.pkl"))
    assert (tmp_path / "latest").read_text() == "step-00000012\n"


def test_the_newest_ones_are_kept_by_step_number(world: Any, tmp_path: Path) -> None:
    training = training_of(world)
    for step in (9, 10, 100_000_000, 11):
        save(world, tmp_path, step, training, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000011", "step-100000000"]
    assert find_checkpoint(tmp_path).name == "step-100000000"
    (tmp_path / "latest").write_text("step-00000011\n")
    assert find_checkpoint(tmp_path).name == "step-100000000", "the step number decides, not the pointer"


def test_a_checkpoint_of_another_plan_is_refused_and_what_differs_is_named(
    world: Any, tmp_path: Path
) -> None:
    path = save(world, tmp_path / "checkpoints", 12)
    other = world.plan.model_copy(update={"seed": world.plan.seed + 1})
    hashes = (
        rf"another plan \({plan_hash(world.plan)[:16]}\.\.\., this plan is {plan_hash(other)[:16]}\.\.\.\)"
    )
    with pytest.raises(Refused, match=hashes):
        load_checkpoint(path, training_of(world), other)
    adapted = world.plan.model_copy(
        update={"task": world.plan.task.model_copy(update={"adapter": Adapter(rank=4)})}
    )
    on_shards = world.plan.model_copy(update={"data": Data(shards="/somewhere")})
    (tmp_path / PLAN_FILE).write_text(dump_plan(world.plan))
    for now, told in (
        (adapted, r"another plan \(task\.adapter is None there and \{'name': 'lora', 'rank': 4"),
        (on_shards, r"another plan \(data\.shards is None there and 'given' here\)"),
    ):
        with pytest.raises(Refused, match=told):
            load_checkpoint(path, training_of(world), now)
    for there, told in (
        (world.plan, rf"another plan \(seed is {world.plan.seed} there and {other.seed} here\): resume with"),
        (other, hashes),  # a plan that it was not made with says nothing of it
    ):
        (tmp_path / PLAN_FILE).write_text(dump_plan(there))
        with pytest.raises(Refused, match=told):
            load_checkpoint(path, training_of(world), other)


def kill_points(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Arms a kill at the n-th call of any function that changes the disk; returns the calls made."""
    count: list[int] = [0]
    wanted = [0]

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == wanted[0]:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    for owner, name in (
        (os, "fsync"), (os, "replace"), (Path, "mkdir"), (Path, "rename"), (Path, "replace"), (Path, "write_text"),
        (checkpoint, "save_file"), (checkpoint.shutil, "rmtree"),
    ):  # fmt: skip
        wrap(owner, name)

    def arm(n: int) -> list[int]:
        count[0], wanted[0] = 0, n
        return count

    return arm


def test_a_kill_at_any_point_of_a_save_loses_nothing(
    world: Any, tmp_path: Path, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = training_of(world, steps=1), training_of(world, steps=2)
    expected = {10: contents(old), 20: contents(new)}
    arm = kill_points(monkeypatch)
    outcomes = []
    for n in range(1, 100):
        directory = tmp_path / str(n)
        arm(0)
        save(world, directory, 5, old)
        save(world, directory, 10, old)
        count = arm(n)
        try:
            save(world, directory, 20, new, keep=1)
            finished = True
        except Killed:
            finished = False
        assert finished == (count[0] < n)
        arm(0)
        loaded = training_of(world, steps=3)
        cursor = load_checkpoint(directory, loaded, world.plan)
        assert same(contents(loaded), expected[cursor.step])
        outcomes.append(cursor.step)
        # The pointer never names something that is not there, and the next save cleans up and goes on.
        assert (directory / (directory / "latest").read_text().strip() / RECORD).is_file()
        save(world, directory, 30, new, keep=1)
        assert sorted(p.name for p in directory.iterdir()) == ["latest", "step-00000030"]
        if finished:
            break
    assert len(outcomes) > 10
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {10, 20}


def test_a_full_disk_is_an_error_that_leaves_the_old_one(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(world, tmp_path, 10)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match=r"step-00000020.*No space left on device"):
        save(world, tmp_path, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000010"]


def test_a_broken_checkpoint_says_so(world: Any, tmp_path: Path) -> None:
    path = save(world, tmp_path, 12)
    tensors, record = (path / STATE_FILE).read_bytes(), (path / RECORD).read_text()
    (path / STATE_FILE).write_bytes(tensors[:-9])
    with pytest.raises(StorageError, match=r"state: .*there is no other beside it"):
        load_checkpoint(path, training_of(world), world.plan)
    (path / STATE_FILE).write_bytes(tensors)
    save(world, tmp_path, 10)
    for text, message in (
        (record[:40], r"training\.json.*resume from \S+step-00000010"),
        (json.dumps({"version": 2}), "plan_hash|step"),
        (record.replace('"version": 2', '"version": 9'), "format version 9, this program reads 2"),
        (record.replace('"step": 12', '"step": "x"'), "wrong type"),
    ):
        (path / RECORD).write_text(text)
        with pytest.raises(StorageError, match=message):
            load_checkpoint(path, training_of(world), world.plan)


def test_a_directory_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no checkpoint in"):
        find_checkpoint(tmp_path)


def test_training_goes_on_while_a_checkpoint_is_written(
    world: Any, tmp_path: Path, same: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved is the state at the call, and the next save waits for the last one."""
    training, may_write = training_of(world), threading.Event()
    saved, original = contents(training), checkpoint.save_file

    def slow(*args: Any) -> None:
        assert may_write.wait(30)
        original(*args)

    monkeypatch.setattr(checkpoint, "save_file", slow)
    saver = Saver(tmp_path, world.task(), plan=world.plan, asynchronous=True)
    path = saver.save(training, Cursor(step=12, sample=48))
    assert saver.written() is None
    assert not path.exists()
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.add_(1.0)
    may_write.set()
    saver.save(training, Cursor(step=13, sample=52))
    assert path.is_dir()
    saver.close()
    other = training_of(world, steps=1)
    load_checkpoint(path, other, world.plan)
    assert same(contents(other), saved)


def test_a_save_in_the_background_that_failed_is_told_by_the_next(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saver = Saver(tmp_path, world.task(), plan=world.plan, asynchronous=True)
    saver.save(training_of(world), Cursor(step=12, sample=48))
    with pytest.raises(StorageError, match=r"step-00000012.*No space left"):
        saver.written(wait=True)
    saver.close()


def test_publish_writes_once_and_points_to_it(world: Any, tmp_path: Path) -> None:
    task = world.task()
    model = task.build_model()
    path = publish(task, model, tmp_path, 3)
    assert path == tmp_path / "round-00000003"
    before = (path / "model.safetensors").read_bytes()
    assert publish(task, task.build_model(), tmp_path, 3) == path
    assert (path / "model.safetensors").read_bytes() == before
    assert (tmp_path / "latest").read_text() == "round-00000003\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "round-00000003"]


def test_a_part_that_a_rank_could_not_write_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's own error is no Exception: nothing but its name would catch it."""
    failed: Future[None] = Future()
    full = OSError(28, "No space left on device")
    failed.set_exception(CheckpointException("write", {1: (full, traceback.extract_stack())}))
    monkeypatch.setattr(checkpoint, "async_save", lambda *_, **__: failed)
    saver = Saver(tmp_path, _Silent(), plan=Plan())  # type: ignore[arg-type]
    write = saver._staged_shards(ALONE, {}, {}, {}, "step-00000010")
    with pytest.raises(
        StorageError, match=r"step-00000010: \[Errno 28\] No space left on device; free space"
    ):
        write()
    saver.close()
