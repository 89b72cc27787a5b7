from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from manyhands.engine import evaluation
from manyhands.engine import run as run_module
from manyhands.engine.checkpoint import STATE
from manyhands.engine.kept_checkpoints import RECORD, find_checkpoint
from manyhands.engine.run import train
from manyhands.engine.settings import Checkpoints, EngineSettings, Execution, Logging
from manyhands.errors import Interrupted, PlanError, Refused, StorageError, WorkerError
from manyhands.plan.resolve import plan_hash


def state(checkpoint: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return load_file(checkpoint / STATE / "state.safetensors"), json.loads((checkpoint / RECORD).read_text())


def test_a_training_learns_reports_and_saves(world: Any, tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    plan = world.with_local(steps=30)
    result = train(plan, tmp_path / "run", on_event=events.append)
    assert result.steps == 120
    assert result.validation_loss_after < 0.8 * result.validation_loss_before
    assert result.tokens == 120 * 4 * 16
    assert result.tokens_per_s > 0
    assert result.checkpoint == tmp_path / "run/checkpoints/step-00000120"
    assert [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()] == events
    assert all(event["version"] == 1 and event["time_ms"] > 0 for event in events)
    kinds = [event["kind"] for event in events]
    assert kinds[:3] == ["preparing", "evaluation", "started"]
    assert kinds[-1] == "finished"
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(10, 121, 10))
    assert [e["step"] for e in events if e["kind"] == "evaluation"] == [0, 60, 120]
    assert [e["step"] for e in events if e["kind"] == "saved"] == [60, 120]
    rates = [e["learning_rate"] for e in events if e["kind"] == "step"]
    assert rates == sorted(rates, reverse=True)


def test_reports_come_as_often_as_asked_and_before_what_is_evaluated_or_saved(
    world: Any, tmp_path: Path
) -> None:
    """Pieces of three steps; every second one is evaluated and saved."""

    def reported(every: int) -> list[int]:
        events: list[dict[str, Any]] = []
        settings = EngineSettings(logging=Logging(every_steps=every))
        result = train(world.plan, tmp_path / str(every), settings=settings, on_event=events.append)
        assert result.tokens == 12 * 4 * 16
        return [event["step"] for event in events if event["kind"] == "step"]

    assert reported(4) == [4, 6, 10, 12]
    assert reported(250) == [6, 12]


@pytest.mark.parametrize("at", [2, 3, 7])
def test_an_interrupted_training_resumes_exactly(world: Any, tmp_path: Path, same: Any, at: int) -> None:
    """SIGINT after step `at`, inside or at the end of a piece of local.steps=3, while evaluations come between."""
    plan = world.plan
    whole = train(plan, tmp_path / "whole")

    taken = 0
    original = run_module.training_step

    def step_and_signal(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == at:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "training_step", step_and_signal)
        words = rf"after step {at}, which is saved in \S*step-0000000{at}; go on with --resume"
        with pytest.raises(Interrupted, match=words):
            train(plan, tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(999)  # what happens in between must not matter
    rest = train(plan, tmp_path / "cut", resume=tmp_path / "cut")

    assert rest.validation_loss_before == whole.validation_loss_before
    assert rest.validation_loss_after == whole.validation_loss_after
    (one, first), (other, second) = state(whole.checkpoint), state(rest.checkpoint)
    assert same(one, other)
    assert first == second
    assert first["sample"] == first["step"] * 4 == 48


@pytest.mark.parametrize(
    ("during", "words", "at"),
    [
        ("preparing", "saving and leaving after the preparation that is under way (no step is saved yet)", 0),
        ("started", "saving and leaving after the evaluation that is under way (no step is saved yet)", 0),
        ("step", r"saving and leaving by step 2, in about \S+ s (no step is saved yet)", 1),
        ("saved", "saving and leaving after the evaluation that is under way (saved so far: step 6)", 6),
    ],
)
def test_a_signal_is_answered_with_what_it_leads_to(
    world: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], during: str, words: str, at: int
) -> None:
    def once(event: dict[str, Any]) -> None:
        if event["kind"] == during and not signalled:
            signalled.append(during)
            signal.raise_signal(signal.SIGTERM)

    signalled: list[str] = []
    every = EngineSettings(logging=Logging(every_steps=1), checkpoints=Checkpoints(asynchronous=False))
    with pytest.raises(Interrupted, match=rf"after step {at}, which is saved in \S*step-0000000{at};"):
        train(world.plan, tmp_path, settings=every, on_event=once)
    told = capfd.readouterr().err
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    assert re.search(rf"^SIGTERM: {pattern}; once more to leave at once$", told, re.MULTILINE), told


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(world: Any, tmp_path: Path) -> None:
    kept = EngineSettings(checkpoints=Checkpoints(keep=9))
    plan = world.with_local(steps=2)  # checkpoints of steps 4 and 8
    train(plan, tmp_path, settings=kept)
    directory = tmp_path / "checkpoints"

    def stop(event: dict[str, Any]) -> None:
        events.append(event)
        if event["kind"] == "step":
            signal.raise_signal(signal.SIGINT)

    events: list[dict[str, Any]] = []
    other = EngineSettings(exec=Execution(precision="bf16"), logging=Logging(every_steps=1))
    with pytest.raises(Interrupted, match="after step 5"):
        train(plan, tmp_path, settings=other, resume=directory / "step-00000004", on_event=stop)
    aside = directory / "aside" / "step-00000008"
    assert [e["checkpoints"] for e in events if e["kind"] == "set_aside"] == [[str(aside)]]
    assert find_checkpoint(tmp_path).name == "step-00000005"
    assert (directory / "latest").read_text() == "step-00000005\n"
    assert (aside / RECORD).is_file()


def test_a_half_event_that_a_kill_has_left_is_cut_off(world: Any, tmp_path: Path) -> None:
    train(world.plan, tmp_path)
    file = tmp_path / "events.jsonl"
    before = file.read_text()
    file.write_text(before + '{"version": 1, "ki')
    train(world.plan, tmp_path, resume=tmp_path)
    assert file.read_text().startswith(before)
    assert [json.loads(line)["kind"] for line in file.read_text().splitlines()][-1] == "finished"


def test_a_second_signal_ends_at_once(world: Any, tmp_path: Path) -> None:
    def twice(event: dict[str, Any]) -> None:
        if event["kind"] == "started":
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(world.plan, tmp_path, on_event=twice)


def test_a_finished_training_resumes_to_the_same_end(world: Any, tmp_path: Path) -> None:
    whole = train(world.plan, tmp_path)
    again = train(world.plan, tmp_path, resume=whole.checkpoint)
    assert again.checkpoint == whole.checkpoint
    assert again.tokens == 0
    assert again.validation_loss_after == whole.validation_loss_after


def test_an_earlier_training_is_not_overwritten(world: Any, tmp_path: Path) -> None:
    train(world.plan, tmp_path)
    with pytest.raises(Refused, match=r"go on from it with --resume .*, or choose another directory"):
        train(world.plan, tmp_path)
    other = world.plan.model_copy(update={"seed": 8})
    with pytest.raises(Refused, match=plan_hash(other)[:16]):
        train(other, tmp_path, resume=tmp_path)


def test_a_loss_that_is_not_finite_stops_the_training(world: Any, tmp_path: Path) -> None:
    plan = world.with_optimizer(name="sgd", lr=1e30, clip_norm=0.0)
    with pytest.raises(
        WorkerError, match=r"the loss is (nan|inf) at step \d+ \(samples .*lower local.optimizer.lr"
    ):
        train(plan, tmp_path)


@pytest.mark.parametrize(
    ("module", "seen", "field", "message"),
    [
        (
            run_module,
            "training_step",
            "gradient_norm",
            r"the gradient's norm is inf at step 2 \(samples 8 to 11 .*lower",
        ),
        (
            evaluation,
            "evaluate",
            "loss",
            r"the loss on validation is inf at step \d+: lower local.optimizer.lr",
        ),
    ],
)
def test_what_is_not_finite_stops_the_training(
    world: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    seen: str,
    field: str,
    message: str,
) -> None:
    """Also where the losses themselves are still finite."""
    real, calls = getattr(module, seen), 0

    def third_time_infinite(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        value = torch.tensor(math.inf) if seen == "training_step" else math.inf
        result = real(*args, **kwargs)
        return dataclasses.replace(result, **{field: value}) if calls == 3 else result

    monkeypatch.setattr(module, seen, third_time_infinite)
    with pytest.raises(WorkerError, match=message):
        train(world.plan, tmp_path)


def test_an_evaluation_that_is_not_finite_is_left_when_steps_are(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, events = evaluation.evaluate, list[dict[str, Any]]()

    def infinite(*args: Any, **kwargs: Any) -> Any:
        return dataclasses.replace(real(*args, **kwargs), loss=math.inf)

    monkeypatch.setattr(evaluation, "evaluate", infinite)
    skip = EngineSettings(exec=Execution(on_nonfinite="skip"))
    result = train(world.plan, tmp_path, settings=skip, on_event=events.append)
    assert result.checkpoint.is_dir()
    told = [event["text"] for event in events if event["kind"] == "warning"]
    assert told[0].startswith("the loss on validation is inf at step 0: the training goes on")
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert all(line["loss"] is None for line in lines if line["kind"] == "evaluation")


def test_what_the_disk_does_not_take_is_not_said_to_be_saved(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manyhands.engine.checkpoint.save_file", full)
    events: list[dict[str, Any]] = []
    with pytest.raises(StorageError, match="No space left"):
        train(world.plan, tmp_path, on_event=events.append)
    assert "saved" not in {event["kind"] for event in events}


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler and its own ways
@pytest.mark.slow
def test_a_compiled_model_learns_the_same(world: Any, tmp_path: Path) -> None:
    compiled = EngineSettings(exec=Execution(compile="default"))
    results = [
        train(world.with_local(steps=2), tmp_path / str(number), settings=settings)
        for number, settings in enumerate((EngineSettings(), compiled))
    ]
    assert results[0].validation_loss_after < results[0].validation_loss_before
    assert results[1].validation_loss_after == pytest.approx(results[0].validation_loss_after, rel=1e-5)
    torch._dynamo.reset()


def test_a_plan_without_local_steps_is_refused(world: Any, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'gradient'.*local.kind=steps"):
        train(world.with_local(kind="gradient"), tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"), [("proximal", 0.01), ("control_variate", True)], ids=["proximal", "control_variate"]
)
def test_terms_that_tie_clients_together_are_refused(
    world: Any, tmp_path: Path, setting: str, value: Any
) -> None:
    """They would have no effect here: a training that ignored them would not be what the plan says."""
    with pytest.raises(PlanError, match=rf"local\.{setting} is {value}"):
        train(world.with_local(**{setting: value}), tmp_path)
    assert not (tmp_path / "events.jsonl").exists()
