"""The five functions: presets converge, uncounted work leaves no trace, star and mesh agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhands.errors import PlanError, UpdateError, WorkerError
from manyhands.plan.compatibility import check
from manyhands.updates import functions
from manyhands.updates.snapshots import fingerprint_of, public_arrays
from manyhands.updates.types import Local, Outer, Public, Trained

SGD = {"name": "sgd", "weight_decay": 0.0, "clip_norm": 0.0}
PLANS = {
    "fedsgd": {"local": {"kind": "gradient"}, "outer": {"name": "adamw", "lr": 0.2}},
    "fedavg": {},
    "fedprox": {"local": {"proximal": 0.1}},
    "scaffold": {"local": {"control_variate": True}},
    "fedadam": {"outer": {"name": "adamw", "lr": 0.2, "bias_correction": False, "epsilon": 1e-3}},
    "diloco": {
        "local": {"optimizer": {"name": "adamw", "lr": 0.05}},
        "outer": {"name": "nesterov", "lr": 0.7, "momentum": 0.5},
    },
    "bf16": {"codec": {"name": "bf16", "error_feedback": True}},
    "int8": {"codec": {"name": "int8", "block": 16, "error_feedback": True}},
    "int8 both ways": {
        "codec": {"name": "int8", "block": 16, "error_feedback": True},
        "change_codec": {"name": "int8", "block": 16, "error_feedback": True},
    },
    "scaffold int8": {
        "local": {"control_variate": True},
        "codec": {"name": "int8", "block": 16, "error_feedback": True},
    },
}


@pytest.fixture
def start(make):
    return make.parameters(make.Trainer.shapes()), Public(
        weights={"w": torch.zeros(6, 3), "b": torch.zeros(3)}
    )


def run_round(make, plan, parameters, public, outer, locals_, trainers, number, lost=()):
    """One round in which everybody works and all but `lost` count."""
    updates, after = {}, {}
    for ordinal, client in enumerate(trainers):
        assignment = make.assignment(number, client, ordinal=ordinal)
        update, after[client] = functions.work(
            public, locals_[client], assignment, make.terms(plan, number),
            plan=plan, parameters=parameters, trainer=trainers[client],
        )  # fmt: skip
        updates[assignment.id] = (client, update)
    counted = {a: c for a, (c, _) in updates.items() if c not in lost}
    closing = make.closing(plan, number, counted, {a: c for a, (c, _) in updates.items() if c in lost})
    if counted:
        merged = functions.merge(
            [updates[a][1].tensors for a in counted], closing, plan=plan, parameters=parameters
        )
        change, outer = functions.advance(public, outer, merged, closing, plan=plan, parameters=parameters)
        public = functions.apply(public, change, plan=plan, parameters=parameters)
    return public, outer, {c: functions.adopt(public, after[c], closing, plan=plan) for c in trainers}


@pytest.mark.parametrize("name", PLANS)
def test_every_kind_of_plan_converges(make, start, name):
    plan = make.plan(**PLANS[name])
    parameters, public = start
    trainers = {c: make.Trainer(plan, seed) for seed, c in enumerate(("one", "two", "three"))}
    outer, locals_ = Outer(), dict.fromkeys(trainers, Local())
    first = max(float(t.loss(public.weights)) for t in trainers.values())
    for number in range(40):
        public, outer, locals_ = run_round(make, plan, parameters, public, outer, locals_, trainers, number)
    last = max(float(t.loss(public.weights)) for t in trainers.values())
    assert last < 0.02 * first
    assert all(not local.pending for local in locals_.values())


def test_one_client_of_fedsgd_with_adamw_is_adamw(make, start):
    plan = make.plan(
        local={"kind": "gradient"}, outer={"name": "adamw", "lr": 0.05, "beta2": 0.95, "weight_decay": 0.1}
    )
    parameters, public = start
    trainer = make.Trainer(plan, 0)
    leaves = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in public.weights.items()}
    central = torch.optim.AdamW(leaves.values(), lr=0.05, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    outer, locals_ = Outer(), {"one": Local()}
    for number in range(50):
        central.zero_grad()
        trainer.loss(leaves).backward()
        central.step()
        public, outer, locals_ = run_round(
            make, plan, parameters, public, outer, locals_, {"one": trainer}, number
        )
        for name, leaf in leaves.items():
            assert (public.weights[name] - leaf.detach()).abs().max() < 1e-6


def same(a, b):
    """Equal to the bit, None and missing included."""
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes() for n in a)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("name", ["int8", "bf16", "scaffold", "scaffold int8"])
def test_an_uncounted_contribution_was_never_sent(make, start, name, before):
    plan = make.plan(**PLANS[name])
    parameters, public = start
    trainers = {c: make.Trainer(plan, seed, shift=seed) for seed, c in enumerate(("one", "two"))}
    outer, locals_ = Outer(), dict.fromkeys(trainers, Local())
    for number in range(before):
        public, outer, locals_ = run_round(make, plan, parameters, public, outer, locals_, trainers, number)
    sent = locals_["two"]
    copies = (
        {c: {n: t.clone() for n, t in f.items()} for c, f in sent.feedback.items()},
        None if sent.control is None else {n: t.clone() for n, t in sent.control.items()},
    )
    _, _, after = run_round(make, plan, parameters, public, outer, locals_, trainers, before, lost={"two"})
    back = after["two"]
    assert back.feedback.keys() == copies[0].keys()
    assert all(same(back.feedback[c], copies[0][c]) for c in copies[0])
    assert same(back.control, copies[1])
    assert not back.pending
    assert back.after == f"{before}-1"
    kept = after["one"]
    moved = kept.feedback if plan.codec.error_feedback else {"control": kept.control}
    held = locals_["one"].feedback if plan.codec.error_feedback else {"control": locals_["one"].control}
    assert any(not same(moved[c], held.get(c)) for c in moved), "what counted must have moved"


def test_the_inner_optimizer_moves_on_whether_counted_or_not(make, start):
    plan = make.plan(**PLANS["diloco"])
    parameters, public = start
    trainers = {"one": make.Trainer(plan, 0), "two": make.Trainer(plan, 1)}
    _, _, locals_ = run_round(
        make, plan, parameters, public, Outer(), dict.fromkeys(trainers, Local()), trainers, 0, lost={"two"}
    )
    assert locals_["two"].inner["w.step"].item() == 5
    run_round(make, plan, parameters, public, Outer(), locals_, trainers, 1)
    assert trainers["two"].calls[-1].inner["w.step"].item() == 5


def test_keep_inner_off_starts_the_optimizer_anew(make, start):
    plan = make.plan(local={"optimizer": {"name": "adamw"}, "keep_inner": False})
    parameters, public = start
    trainers, locals_ = {"one": make.Trainer(plan, 0)}, {"one": Local()}
    for number in range(2):
        public, _, locals_ = run_round(make, plan, parameters, public, Outer(), locals_, trainers, number)
    assert [call.inner for call in trainers["one"].calls] == [None, None]
    assert locals_["one"].inner is None


def test_scaffold_by_hand(make, start):
    """Option II: c_k' = c_k - c + (theta - theta_k) / (K lr); c moves by the mean over the round's clients."""
    plan = make.plan(**PLANS["scaffold"])
    parameters, public = start
    zeros = {n: torch.zeros_like(w) for n, w in public.weights.items()}
    trainers = {c: make.Trainer(plan, seed, shift=seed) for seed, c in enumerate(("one", "two"))}
    locals_ = dict.fromkeys(trainers, Local())
    for number in range(3):
        expected = {}
        for c, t in trainers.items():
            own, shared = locals_[c].control or zeros, public.control or zeros
            correction = {n: shared[n] - own[n] for n in own}
            terms = make.terms(plan, number)
            ends = t.train(
                public.weights, None, make.assignment(number, c), terms, correction=correction
            ).tensors
            expected[c] = {n: own[n] - shared[n] + (public.weights[n] - ends[n]) / (5 * 0.1) for n in own}
        public, _, locals_ = run_round(make, plan, parameters, public, Outer(), locals_, trainers, number)
        for n in zeros:
            for c in trainers:
                assert torch.allclose(locals_[c].control[n], expected[c][n], atol=1e-4)
            assert torch.allclose(public.control[n], sum(expected[c][n] for c in trainers) / 2, atol=1e-4)


def test_control_variates_mend_the_drift_of_unlike_clients(make, start):
    """Different optima and many local steps: FedAvg stops beside the common optimum, SCAFFOLD reaches it."""
    steepness = {}
    for control in (False, True):
        plan = make.plan(local={"control_variate": control, "steps": 20})
        parameters, public = start
        trainers = {
            "one": make.Trainer(plan, 0, samples=8, shift=2.0), "two": make.Trainer(plan, 1, shift=-2.0)
        }  # fmt: skip
        outer, locals_ = Outer(), dict.fromkeys(trainers, Local())
        for number in range(120):
            public, outer, locals_ = run_round(
                make, plan, parameters, public, outer, locals_, trainers, number
            )
        leaves = {n: t.clone().requires_grad_(True) for n, t in public.weights.items()}
        (sum(t.loss(leaves) for t in trainers.values()) / 2).backward()
        steepness[control] = float(sum((leaf.grad**2).sum() for leaf in leaves.values()))
    assert steepness[True] < 1e-2 * steepness[False]


def test_pending_of_an_abandoned_piece_of_work_is_taken_back_first(make, start):
    plan = make.plan(**PLANS["scaffold int8"])
    parameters, public = start
    trainer = make.Trainer(plan, 0)

    def once(local, ordinal):
        return functions.work(
            public, local, make.assignment(0, "one", ordinal=ordinal), make.terms(plan, 0),
            plan=plan, parameters=parameters, trainer=trainer,
        )  # fmt: skip

    straight, expected = once(Local(), 7)
    _, given_up = once(Local(), 1)
    again, found = once(given_up, 7)
    assert all(again.tensors[n].tobytes() == straight.tensors[n].tobytes() for n in straight.tensors)
    assert same(found.control, expected.control)
    assert found.pending.keys() == {0}
    assert again.start == "0-1"


@pytest.mark.parametrize(
    ("name", "start_of_third"), [("int8", "fresh"), ("scaffold", "fresh"), ("fedavg", "0-0")]
)
def test_a_client_that_missed_a_closing_starts_afresh_where_it_matters(make, start, name, start_of_third):
    plan = make.plan(**PLANS[name])
    parameters, public = start
    trainer = make.Trainer(plan, 0)
    _, local = functions.work(
        public, Local(), make.assignment(0, "one"), make.terms(plan, 0),
        plan=plan, parameters=parameters, trainer=trainer,
    )  # fmt: skip
    update, after = functions.work(
        public, local, make.assignment(2, "one"), make.terms(plan, 2),
        plan=plan, parameters=parameters, trainer=trainer,
    )  # fmt: skip
    assert update.start == start_of_third
    assert after.pending.keys() == {2}


def test_nothing_is_written_into_an_argument(make, start):
    plan = make.plan(**PLANS["scaffold int8"], outer={"name": "adamw", "lr": 0.1})
    parameters, public = start
    trainers = {"one": make.Trainer(plan, 0)}
    locals_, outer = {"one": Local()}, Outer()
    for number in range(3):
        before = {n: t.clone() for n, t in public.weights.items()}
        held = outer
        moments = {m: {n: t.clone() for n, t in ts.items()} for m, ts in outer.moments.items()}
        old = public
        public, outer, locals_ = run_round(make, plan, parameters, public, outer, locals_, trainers, number)
        assert same(old.weights, before)
        assert all(same(held.moments[m], moments[m]) for m in moments)


def test_arrays_in_arrays_out_with_the_same_bits(make, start):
    plan = make.plan(change_codec={"name": "bf16", "error_feedback": True}, outer={"name": "nesterov"})
    parameters, public = start
    arrays = Public(weights={n: t.numpy().copy() for n, t in public.weights.items()})
    closing = make.closing(plan, 0, {"0-0": "one"})
    update = {"delta/w": np.full((6, 3), 0.3, np.float32), "delta/b": np.full(3, -0.7, np.float32)}
    merged = functions.merge([update], closing, plan=plan, parameters=parameters)
    found = []
    for given in (public, arrays):
        change, outer = functions.advance(given, Outer(), merged, closing, plan=plan, parameters=parameters)
        new = functions.apply(given, change, plan=plan, parameters=parameters)
        assert type(new.weights["w"]) is type(given.weights["w"])
        assert type(outer.residual["delta/w"]) is type(given.weights["w"])
        found.append(fingerprint_of(public_arrays(new)))
    assert found[0] == found[1]


def test_work_that_diverged_is_an_error(make, start):
    plan, (parameters, public) = make.plan(), start

    class Diverging(make.Trainer):
        def train(self, weights, inner, assignment, terms, **kwargs):
            done = super().train(weights, inner, assignment, terms, **kwargs)
            done.tensors["w"][2, 1] = float("nan")
            return done

    with pytest.raises(UpdateError, match=r"the work of 0-0: 'delta/w' is nan at position 7"):
        functions.work(
            public, Local(), make.assignment(0, "one"), make.terms(plan, 0),
            plan=plan, parameters=parameters, trainer=Diverging(plan, 0),
        )  # fmt: skip


@pytest.mark.parametrize("tensors", [{"w": torch.zeros(6, 3)}, {"w": torch.zeros(3, 6), "b": torch.zeros(3)}])
def test_a_trainer_whose_tensors_do_not_fit_is_an_error(make, start, tensors):
    plan, (parameters, public) = make.plan(), start

    class Wrong:
        def train(self, *_, **__):
            return Trained(tensors=tensors, inner=None, loss=0.0, tokens=0, samples=0, steps=1)

    with pytest.raises(WorkerError, match="the trainer gave"):
        functions.work(
            public, Local(), make.assignment(0, "one"), make.terms(plan, 0),
            plan=plan, parameters=parameters, trainer=Wrong(),
        )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": {"lag": 1}},
        {"rounds": {"fragments": 2}},
        {"rounds": {"apply_after_steps": 1}},
        {"buffers": "average"},
        {"topology": "mesh", "change_codec": {"name": "bf16"}},
        {"local": {"kind": "gradient", "proximal": 0.1}},
    ],
    ids=str,
)
def test_what_is_not_carried_out_is_refused(make, changes):
    with pytest.raises(PlanError):
        check(make.plan(**changes))


def test_zero_learning_rates_leave_the_control_variate(make, start):
    plan, (parameters, public) = make.plan(**PLANS["scaffold"]), start
    terms = make.terms(plan, 0)
    terms = type(terms)(**{f: getattr(terms, f) for f in terms.__slots__} | {"learning_rates": (0.0,) * 30})
    update, local = functions.work(
        public, Local(), make.assignment(0, "one"), terms,
        plan=plan, parameters=parameters, trainer=make.Trainer(plan, 0),
    )  # fmt: skip
    assert not update.tensors["control/w"].any()
    assert not local.control["w"].any()
