from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from manyhands.data.ranges import indices_of
from manyhands.engine.optimizer import build_optimizer
from manyhands.engine.parallel import Parallelized
from manyhands.engine.step import Steering, Step, training_step
from manyhands.engine.trainer import EngineTrainer, Progress, load_weights
from manyhands.errors import PlanError, WorkerError
from manyhands.plan.schema import Data
from manyhands.updates.types import Abandoned, Trainer


def take_step(task: Any, model: torch.nn.Module, batches: Any, **more: Any) -> Step:
    """On one device."""
    return training_step(task, Parallelized.whole(model), batches, **more)


def test_it_is_a_trainer(world: Any) -> None:
    trainer: Trainer = EngineTrainer(world.task(), world.plan)
    assert isinstance(trainer, EngineTrainer)


@pytest.mark.parametrize("optimizer", [{}, {"name": "sgd", "momentum": 0.9, "lr": 0.1}])
def test_two_rounds_equal_a_restore_in_between(world: Any, same: Any, optimizer: dict[str, Any]) -> None:
    plan = world.with_optimizer(**optimizer)
    one = EngineTrainer(world.task(), plan)
    first = one.train(world.weights(), None, *world.work(0))
    second = one.train(first.tensors, first.inner, *world.work(1))

    other = EngineTrainer(world.task(), plan)
    other.train(world.weights(), None, *world.work(3))  # another past
    again = other.train(first.tensors, first.inner, *world.work(1))
    assert same(second.tensors, again.tensors)
    assert same(second.inner, again.inner)
    assert second.loss == again.loss
    assert not same(first.tensors, second.tensors)
    if not optimizer:
        assert float(second.inner["step/transformer.wte.weight"]) == 6


def test_the_work_is_what_a_hand_written_loop_does(world: Any) -> None:
    assignment, terms = world.work(1)
    done = EngineTrainer(world.task(), world.plan).train(world.weights(), None, assignment, terms)

    task = world.task()
    model = task.build_model()
    load_weights(model, world.weights())
    optimizer = build_optimizer(world.plan.local.optimizer, model)
    indices = indices_of(assignment.ranges, world.prepared.samples, world.plan.seed)
    losses, steering = [], Steering(clip_norm=1.0)
    for i in range(3):
        batch = task.batch(indices[4 * i : 4 * i + 4])
        rate = terms.learning_rates[i]
        step = training_step(
            task,
            Parallelized.whole(model),
            [batch],
            optimizer=optimizer,
            learning_rate=rate,
            steering=steering,
        )
        losses.append(float(step.loss))
    assert done.loss == pytest.approx(sum(losses) / 3, rel=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.equal(done.tensors[name], parameter)
    assert (done.samples, done.tokens, done.steps) == (12, 12 * 16, 3)


def test_arguments_are_not_written_to_and_results_are_copies(world: Any, same: Any) -> None:
    trainer = EngineTrainer(world.task(), world.plan)
    weights = world.weights()
    first = trainer.train(weights, None, *world.work(0))
    assert same(weights, world.weights())
    tensors = {name: tensor.clone() for name, tensor in first.tensors.items()}
    inner = {name: tensor.clone() for name, tensor in first.inner.items()}
    trainer.train(first.tensors, first.inner, *world.work(1))
    assert same(first.tensors, tensors)
    assert same(first.inner, inner)
    for tensor in first.tensors.values():
        assert tensor.dtype == torch.float32
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()


def test_a_shorter_assignment_uses_the_first_learning_rates(world: Any) -> None:
    trainer = EngineTrainer(world.task(), world.plan)
    done = trainer.train(world.weights(), None, *world.work(0, steps=2))
    assert done.steps == 2
    assignment, terms = world.work(0, steps=3)
    with pytest.raises(PlanError, match="2 learning rates"):
        trainer.train(
            world.weights(), None, assignment, dataclasses.replace(terms, learning_rates=(1e-3, 1e-3))
        )
    with pytest.raises(PlanError, match="12 samples, and 2 steps of 4 need 8"):
        trainer.train(world.weights(), None, dataclasses.replace(assignment, steps=2), terms)


def test_gradient_is_the_mean_over_all_samples(world: Any) -> None:
    assignment, _ = world.work(0)
    trainer = EngineTrainer(world.task(), world.plan)
    done = trainer.gradient(world.weights(), assignment)
    assert done.inner is None

    task = world.task()
    model = task.build_model()
    load_weights(model, world.weights())
    indices = indices_of(assignment.ranges, world.prepared.samples, world.plan.seed)
    loss = task.loss(model, task.batch(indices))
    loss.mean.backward()
    assert done.loss == pytest.approx(loss.mean.item(), rel=1e-6)
    assert done.samples == 12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(done.tensors[name], parameter.grad, rtol=1e-4, atol=1e-7)


def test_micro_batches_change_the_result_only_by_rounding(world: Any) -> None:
    whole = EngineTrainer(world.task(), world.plan).train(world.weights(), None, *world.work(0))
    split = EngineTrainer(world.task(), world.plan, micro_batch_size=3).train(
        world.weights(), None, *world.work(0)
    )
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(split.tensors[name], tensor, rtol=1e-2, atol=1e-4)


def test_correction_and_proximal_reach_the_steps(world: Any, same: Any) -> None:
    trainer = EngineTrainer(world.task(), world.with_optimizer(name="sgd", weight_decay=0.0, clip_norm=0.0))
    assignment, terms = world.work(0, steps=1)
    plain = trainer.train(world.weights(), None, assignment, terms)
    correction = {name: torch.full_like(tensor, 2.0) for name, tensor in world.weights().items()}
    corrected = trainer.train(world.weights(), None, assignment, terms, correction=correction)
    rate = terms.learning_rates[0]
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(corrected.tensors[name], tensor - rate * 2.0, rtol=1e-4, atol=1e-6)
    # One step from the anchor itself: the proximal term is zero there; later ones are pulled back to it.
    assert same(trainer.train(world.weights(), None, assignment, terms, proximal=5.0).tensors, plain.tensors)
    assignment, terms = world.work(2)
    start = world.weights()

    def distance(done: Any) -> float:
        return sum(float((done.tensors[n] - start[n]).square().sum()) for n in start)

    free = trainer.train(start, None, assignment, terms)
    held = trainer.train(start, None, assignment, terms, proximal=100.0)
    assert distance(held) < distance(free)


def test_a_loss_that_is_not_finite_is_named(world: Any) -> None:
    weights = world.weights()
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"] * torch.inf
    with pytest.raises(WorkerError, match=r"loss is nan at step 0 of assignment 2-0 \(round 2\)"):
        EngineTrainer(world.task(), world.plan).train(weights, None, *world.work(2))


def test_weights_that_do_not_fit_are_named(world: Any) -> None:
    trainer = EngineTrainer(world.task(), world.plan)
    weights = world.weights()
    removed = {name: t for name, t in weights.items() if name != "transformer.wpe.weight"}
    with pytest.raises(WorkerError, match=r"'transformer.wpe.weight' is only in the model"):
        trainer.train(removed, None, *world.work(0))
    with pytest.raises(WorkerError, match=r"'transformer.wpe.weight' has shape \[3\]"):
        trainer.train(weights | {"transformer.wpe.weight": torch.zeros(3)}, None, *world.work(0))


def test_abandoned_work_stops_and_the_next_is_not_touched(world: Any, same: Any) -> None:
    expected = EngineTrainer(world.task(), world.plan).train(world.weights(), None, *world.work(1))
    steps: list[Progress] = []
    trainer = EngineTrainer(
        world.task(), world.plan, on_progress=steps.append, abandoned=lambda: len(steps) == 2
    )
    with pytest.raises(Abandoned):
        trainer.train(world.weights(), None, *world.work(0))
    assert [p.step for p in steps] == [1, 2]
    steps.clear()
    trainer.abandoned = lambda: False
    assert same(trainer.train(world.weights(), None, *world.work(1)).tensors, expected.tensors)


def test_progress_says_what_was_done(world: Any) -> None:
    seen: list[Progress] = []
    done = EngineTrainer(world.task(), world.plan, on_progress=seen.append).train(
        world.weights(), None, *world.work(0)
    )
    assert [(p.step, p.steps, p.samples, p.tokens) for p in seen] == [
        (i, 3, 4 * i, 64 * i) for i in (1, 2, 3)
    ]
    assert sum(p.loss for p in seen) / 3 == pytest.approx(done.loss)


def test_local_data_is_drawn_by_the_seed_of_the_assignment(world: Any, same: Any) -> None:
    plan = world.plan.model_copy(update={"data": Data(kind="local")})
    assignment, terms = world.work(0)
    assignment = dataclasses.replace(assignment, ranges=())
    trainer = EngineTrainer(world.task(), plan)
    one = trainer.train(world.weights(), None, assignment, terms)
    assert same(trainer.train(world.weights(), None, assignment, terms).tensors, one.tensors)
    other = trainer.train(world.weights(), None, dataclasses.replace(assignment, seed=99), terms)
    assert not same(other.tensors, one.tensors)


def test_the_global_generators_are_seeded_from_the_assignment(world: Any) -> None:
    trainer = EngineTrainer(world.task(), world.plan)
    drawn = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        np.random.seed(noise)
        trainer.train(world.weights(), None, *world.work(0))
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[1]
