from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from manyhands.data.ranges import indices_of, ranges_between
from manyhands.engine.optimizer import build_optimizer
from manyhands.engine.parallel import Parallelized
from manyhands.engine.step import Steering, Step, training_step
from manyhands.engine.trainer import load_weights
from manyhands.tasks.protocol import Loss
from manyhands.updates.types import Abandoned


def take_step(task: Any, model: torch.nn.Module, batches: Any, **more: Any) -> Step:
    """On one device."""
    return training_step(task, Parallelized.whole(model), batches, **more)


def loaded(world: Any) -> tuple[Any, torch.nn.Module]:
    task = world.task()
    model = task.build_model()
    load_weights(model, world.weights())
    return task, model


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_twenty_steps_equal_a_bare_loop_bit_for_bit(world: Any) -> None:
    rates = [1e-3 * (i + 1) / 20 for i in range(20)]
    total = world.prepared.samples
    indices = [indices_of(ranges_between(4 * i, 4 * i + 4, total), total, 7) for i in range(20)]

    task, model = loaded(world)
    optimizer = build_optimizer(world.plan.local.optimizer, model)
    steering = Steering(clip_norm=1.0)
    ours = []
    for chosen, rate in zip(indices, rates, strict=True):
        batches = [task.batch(chosen)]
        step = training_step(
            task,
            Parallelized.whole(model),
            batches,
            optimizer=optimizer,
            learning_rate=rate,
            steering=steering,
        )
        ours.append(float(step.loss))

    _, bare = loaded(world)
    matrices = [p for p in bare.parameters() if p.ndim >= 2]
    others = [p for p in bare.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=1.0, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip
    theirs = []
    for chosen, rate in zip(indices, rates, strict=True):
        rows = torch.stack(
            [torch.from_numpy(task.training[i * 16 : i * 16 + 17].astype(np.int64)) for i in chosen]
        )
        logits = bare(input_ids=rows[:, :-1]).logits
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1))
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        theirs.append(loss.item())

    assert ours == theirs
    assert ours[-1] < ours[0] - 0.1
    for one, other in zip(model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(one, other)


def test_micro_batches_of_unequal_size_give_the_mean_over_all(world: Any) -> None:
    task, model = loaded(world)
    whole = take_step(task, model, [task.batch(np.arange(7))], optimizer=None)
    expected = gradients(model)
    parts = [task.batch(np.arange(7)[part]) for part in (slice(0, 2), slice(2, 3), slice(3, 7))]
    split = take_step(task, model, parts, optimizer=None)
    assert split.count == whole.count == 7 * 16
    assert float(split.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    for one, other in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_correction_and_proximal_term_join_the_gradient_before_clipping(world: Any) -> None:
    task, model = loaded(world)
    batch = task.batch(np.arange(4))
    take_step(task, model, [batch], optimizer=None)
    plain = gradients(model)
    correction = [torch.full_like(p, 0.01) for p in model.parameters()]
    anchor = [p.detach() - 0.5 for p in model.parameters()]
    steering = Steering(correction=correction, anchor=anchor, proximal=0.2)
    take_step(task, model, [batch], optimizer=None, steering=steering)
    for steered, gradient in zip(gradients(model), plain, strict=True):
        torch.testing.assert_close(steered, gradient + 0.01 + 0.2 * 0.5, rtol=1e-4, atol=1e-5)

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    steering = Steering(correction=correction, anchor=anchor, proximal=0.2, clip_norm=0.25)
    step = take_step(task, model, [batch], optimizer=optimizer, learning_rate=1.0, steering=steering)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, model.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.25, rel=1e-4)
    assert step.gradient_norm is not None
    assert float(step.gradient_norm) > 1.0


def test_without_clipping_there_is_no_norm_and_the_rate_is_the_one_given(world: Any) -> None:
    task, model = loaded(world)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    before = [p.detach().clone() for p in model.parameters()]
    step = take_step(task, model, [task.batch(np.arange(2))], optimizer=optimizer, learning_rate=0.5)
    assert step.gradient_norm is None
    for start, end in zip(before, model.parameters(), strict=True):
        assert torch.equal(start - 0.5 * end.grad, end)


def test_abandoned_work_ends_between_micro_batches_and_leaves_the_weights(world: Any) -> None:
    task, model = loaded(world)
    optimizer = build_optimizer(world.plan.local.optimizer, model)
    before = [p.detach().clone() for p in model.parameters()]
    asked = []

    def abandoned() -> bool:
        asked.append(True)
        return len(asked) == 3

    micro_batches = (task.batch(np.array([i])) for i in range(8))
    with pytest.raises(Abandoned):
        training_step(
            task,
            Parallelized.whole(model),
            micro_batches,
            optimizer=optimizer,
            learning_rate=1.0,
            abandoned=abandoned,
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    # What was left in .grad does not leak into the next step.
    take_step(task, model, [task.batch(np.arange(3))], optimizer=None)
    after = gradients(model)
    _, fresh = loaded(world)
    take_step(task, fresh, [task.batch(np.arange(3))], optimizer=None)
    assert all(torch.equal(a, b) for a, b in zip(after, gradients(fresh), strict=True))


def test_bf16_is_near_fp32_and_keeps_fp32_gradients(world: Any) -> None:
    task, model = loaded(world)
    full = take_step(task, model, [task.batch(np.arange(8))], optimizer=None)
    half = take_step(task, model, [task.batch(np.arange(8))], optimizer=None, precision="bf16")
    assert float(half.loss) != float(full.loss)
    assert float(half.loss) == pytest.approx(float(full.loss), rel=0.01)
    assert all(g.dtype == torch.float32 for g in gradients(model))


class Counted:
    """Samples x; the loss is the mean of weight * x, over as many as the batch says."""

    def loss(self, model: torch.nn.Module, batch: Any) -> Loss:
        values = batch["x"] * model.weight
        mean = values.mean() if len(values) else values.sum()
        return Loss(mean=mean, count=len(values), parts={"twice": 2 * mean})


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))


def test_a_micro_batch_that_counts_nothing_changes_nothing() -> None:
    parts = [{"x": torch.tensor(x)} for x in ([], [2.0, 4.0], [], [9.0])]
    model = Scale()
    step = take_step(Counted(), model, parts, optimizer=None)
    assert float(step.loss) == pytest.approx(5.0)
    assert float(step.parts["twice"]) == pytest.approx(10.0)
    assert not step.parts["twice"].requires_grad
    assert float(model.weight.grad) == pytest.approx(5.0)
    nothing = take_step(Counted(), model, parts[:1], optimizer=None)
    assert (float(nothing.loss), nothing.count, float(model.weight.grad)) == (0.0, 0, 0.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_can_be_left_out(value: float) -> None:
    model = Scale()
    optimizer = torch.optim.AdamW(model.parameters())
    more = {"optimizer": optimizer, "learning_rate": 0.1, "skip_nonfinite": True}
    bad = take_step(Counted(), model, [{"x": torch.tensor([1.0, value])}], **more)
    assert bad.skipped
    assert model.weight.tolist() == [1.0]
    assert not optimizer.state
    model.weight.register_hook(lambda gradient: gradient * value if bad is None else gradient)
    bad = None
    spoilt = take_step(Counted(), model, [{"x": torch.tensor([1.0])}], **more)
    assert spoilt.skipped, "a finite loss with a gradient that is not, also without clipping"
    bad = spoilt
    good = take_step(Counted(), model, [{"x": torch.tensor([1.0])}], **more)
    assert not good.skipped
    assert model.weight.tolist() < [1.0]


def test_gradients_of_bf16_weights_are_summed_in_fp32() -> None:
    """256 + 1 is 256 in bf16, so a sum of many small ones would stop there."""
    parts = [{"x": torch.tensor([256.0 if i == 0 else 1.0], dtype=torch.bfloat16)} for i in range(257)]
    sums = {}
    for fp32_sum in (False, True):
        model = Scale().to(torch.bfloat16)
        take_step(Counted(), model, parts, optimizer=None, fp32_sum=fp32_sum)
        sums[fp32_sum] = float(model.weight.grad) * 257
    assert sums[False] == pytest.approx(256, rel=0.01)
    assert sums[True] == pytest.approx(512, rel=0.01)
