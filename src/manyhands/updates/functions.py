"""The five functions of a round: work, merge, advance, apply, adopt. Pure; the same everywhere.

    work    (public, local, assignment, terms)  -> (update, local')        on a client
    merge   (updates, closing)                  -> merged                  where the topology says
    advance (public, outer, merged, closing)    -> (change, outer')        likewise
    apply   (public, change)                    -> public'                 everywhere, exact
    adopt   (public', local', closing)          -> local''                 on a client

Nothing is written into an argument, so an old value keeps its bits: that is how a contribution that did not count
is undone. merge, advance and apply are exact (exact.py); work is not and need not be.

Tensors go in and come out as torch tensors or as numpy arrays (views.py). Wire tensors and merged ones are numpy
arrays by the names of plan/wire.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from manyhands.coordination.types import Assignment, Closing, RoundTerms
from manyhands.errors import UpdateError, WorkerError
from manyhands.plan import wire
from manyhands.plan.compatibility import check
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.updates.checks import norms_of
from manyhands.updates.codecs import decode, encode
from manyhands.updates.exact import F32
from manyhands.updates.merge import Merger
from manyhands.updates.outer import advance_arrays, apply_arrays, empty_like
from manyhands.updates.snapshots import complete, complete_outer, outer_of, public_arrays, public_of
from manyhands.updates.types import (
    CONTROL,
    MAIN,
    Arrays,
    Local,
    Outer,
    Pending,
    Public,
    Trained,
    Trainer,
    Update,
)
from manyhands.updates.views import as_arrays, like


def work(
    public: Public,
    local: Local,
    assignment: Assignment,
    terms: RoundTerms,
    *,
    plan: Plan,
    parameters: Sequence[Parameter],
    trainer: Trainer,
) -> tuple[Update, Local]:
    """Do an assignment from `public`: the update to send, and the local state behind it.

    Raises UpdateError when the result is not finite (the work diverged), WorkerError when the trainer gives
    tensors that do not fit, and what the trainer raises: Abandoned, for one.
    """
    check(plan)
    local = local_at_start(local, assignment, plan)
    wrap = like(public.weights)
    trained = _train(public, local, assignment, terms, plan, parameters, trainer)
    intended = _intended(public, trained, terms, plan, parameters)
    tensors, lost, sent = _encode(intended, local, plan)
    norms = norms_of(
        plan.codec, wire.channels(plan), parameters, tensors, where=f"the work of {assignment.id}"
    )
    control = local.control
    if plan.local.control_variate:
        moved = intended[CONTROL] if plan.codec.error_feedback else sent[CONTROL]
        held = as_arrays(local.control or {})
        control = wrap({name: held[name] + d if name in held else d for name, d in moved.items()})
    kept = {channel: wrap(arrays) for channel, arrays in lost.items()}
    after = Local(
        inner=trained.inner if plan.local.keep_inner else None,
        feedback=kept,
        control=control,
        pending={
            **local.pending,
            assignment.round: Pending(
                assignment=assignment.id, feedback=local.feedback, control=local.control
            ),
        },
        after=assignment.id,
    )
    update = Update(
        tensors=tensors,
        norm=norms[MAIN],
        start=local.after,
        loss=trained.loss,
        tokens=trained.tokens,
        samples=trained.samples,
        steps=trained.steps,
    )
    return update, after


def merge(
    updates: Sequence[Arrays], closing: Closing, *, plan: Plan, parameters: Sequence[Parameter]
) -> Arrays:
    """The mean of the counted updates, given in the closing's order, by `<channel>/<parameter>`.

    Every update is looked at as a whole before it is added, for what every machine sees alike. Raises UpdateError.
    """
    if len(updates) != len(closing.counted):
        raise UpdateError(f"{len(updates)} updates for {len(closing.counted)} counted contributions")
    merger = Merger(plan, parameters)
    for update, counted in zip(updates, closing.counted, strict=True):
        merger.add_arrays(update, counted.weight, counted.factor, where=f"the update of {counted.assignment}")
    return merger.merged(clients=clients_of(closing))


def advance(
    public: Public,
    outer: Outer,
    merged: Arrays,
    closing: Closing,
    *,
    plan: Plan,
    parameters: Sequence[Parameter],
) -> tuple[Arrays, Outer]:
    """One step of the outer optimizer: the encoded change of `public`, and the outer state behind it."""
    check(plan)
    wrap = like(public.weights)
    before = complete_outer(outer, plan, parameters)
    change = empty_like(wire.change_schema(plan, parameters))
    after = empty_like(wire.outer_schema(plan, parameters))
    advance_arrays(
        plan,
        parameters,
        closing.outer,
        merged=merged,
        public=complete(public_arrays(public), plan, parameters),
        outer=before,
        change_out=change,
        outer_out=after,
    )
    state = outer_of(after)
    return change, Outer(
        moments={moment: wrap(as_arrays(tensors)) for moment, tensors in state.moments.items()},
        residual=None if state.residual is None else wrap(as_arrays(state.residual)),
    )


def apply(public: Public, change: Arrays, *, plan: Plan, parameters: Sequence[Parameter]) -> Public:
    """`public` plus the decoded change. Parameters that are not trained are shared with the old one."""
    wrap = like(public.weights)
    before = complete(public_arrays(public), plan, parameters)
    after = empty_like({name: ("F32", array.shape) for name, array in before.items()})
    after |= {p.name: before[p.name] for p in parameters if not p.trainable}
    apply_arrays(plan, parameters, public=before, change=change, public_out=after)
    new = public_of(after)
    return Public(
        weights=wrap(as_arrays(new.weights)),
        control=None if new.control is None else wrap(as_arrays(new.control)),
    )


def adopt(public: Public, local: Local, closing: Closing, *, plan: Plan) -> Local:
    """The local state once a round is closed and `public` has its change.

    Settles what is pending of that round: counted, it is dropped; not counted, error feedback and control variate
    go back to what they were before the work, bit for bit. The inner optimizer has moved on either way.
    """
    del public, plan  # without lag the live weights are public's; with it, mixing them is done here
    pending = local.pending.get(closing.round)
    if pending is None:
        return local
    if pending.assignment in {counted.assignment for counted in closing.counted}:
        return _without(local, closing.round)
    return _taken_back(local, closing.round)


# ------------------------------------------------------------------------------------------ local state
def local_at_start(local: Local, assignment: Assignment, plan: Plan) -> Local:
    """The local state from which an assignment is done.

    An earlier piece of work of the same round was given up, so it is taken back. If the fate of an older round is
    unknown (the client missed its closing), error feedback and control variate cannot be trusted, and the client
    starts afresh, which its claims say; where there is neither, nothing depends on it.
    """
    if assignment.round in local.pending:
        local = _taken_back(local, assignment.round)
    if local.pending:
        if plan.codec.error_feedback or plan.local.control_variate:
            return Local()
        local = replace(local, pending={})
    return local


def _without(local: Local, round_number: int) -> Local:
    return replace(local, pending={r: p for r, p in local.pending.items() if r != round_number})


def _taken_back(local: Local, round_number: int) -> Local:
    pending = local.pending[round_number]
    return replace(_without(local, round_number), feedback=pending.feedback, control=pending.control)


# ------------------------------------------------------------------------------------------ parts of work
def _train(
    public: Public,
    local: Local,
    assignment: Assignment,
    terms: RoundTerms,
    plan: Plan,
    parameters: Sequence[Parameter],
    trainer: Trainer,
) -> Trained:
    weights = public.weights
    if plan.local.kind == "gradient":
        return trainer.gradient(weights, assignment)
    correction = None
    if plan.local.control_variate:
        shared = as_arrays(public.control or {})
        own = as_arrays(local.control or {})
        zeros = {p.name: np.zeros(p.shape, np.float32) for p in wire.trainable(parameters)}
        correction = like(weights)({n: shared.get(n, zero) - own.get(n, zero) for n, zero in zeros.items()})
    return trainer.train(
        weights,
        local.inner if plan.local.keep_inner else None,
        assignment,
        terms,
        correction=correction,
        proximal=plan.local.proximal,
    )


def _intended(
    public: Public,
    trained: Trained,
    terms: RoundTerms,
    plan: Plan,
    parameters: Sequence[Parameter],
) -> dict[str, dict[str, F32]]:
    """What would be sent if the codec lost nothing and nothing was left over from earlier: by channel."""
    ends = _trained_arrays(trained, parameters)
    names = [p.name for p in wire.trainable(parameters)]
    if plan.local.kind == "gradient":
        return {MAIN: {name: ends[name] for name in names}}
    starts = as_arrays(public.weights)
    intended = {MAIN: {name: starts[name] - ends[name] for name in names}}
    if plan.local.control_variate:
        rate = math.fsum(terms.learning_rates[: trained.steps])
        intended[CONTROL] = _control_delta(as_arrays(public.control or {}), intended[MAIN], rate)
    return intended


def _trained_arrays(trained: Trained, parameters: Sequence[Parameter]) -> dict[str, F32]:
    ends = as_arrays(trained.tensors)
    for p in wire.trainable(parameters):
        if p.name not in ends or ends[p.name].shape != p.shape:
            found = ends[p.name].shape if p.name in ends else "nothing"
            raise WorkerError(f"the trainer gave {found} for parameter '{p.name}'; expected shape {p.shape}")
    return ends


def _control_delta(shared: dict[str, F32], delta: dict[str, F32], rate: float) -> dict[str, F32]:
    """SCAFFOLD's option II (1910.06378): c_k' - c_k = (theta - theta_k) / (sum of learning rates) - c.

    The sum over the steps done stands for K * lr where the rate varies; without any, c_k stays as it is.
    """
    if rate <= 0:
        return {name: np.zeros_like(d) for name, d in delta.items()}
    mean = {name: d / np.float32(rate) for name, d in delta.items()}
    return {name: m - shared[name] if name in shared else m for name, m in mean.items()}


def _encode(
    intended: dict[str, dict[str, F32]], local: Local, plan: Plan
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, F32]], dict[str, dict[str, F32]]]:
    """Wire tensors; what the codec lost, where that is fed back; and what the others will decode."""
    tensors: dict[str, np.ndarray] = {}
    lost: dict[str, dict[str, F32]] = {}
    sent: dict[str, dict[str, F32]] = {}
    with np.errstate(all="ignore"):  # what is not finite is found by the check that follows
        for channel, values in intended.items():
            held = as_arrays(local.feedback.get(channel, {}))
            for name, value in values.items():
                total = value + held[name] if name in held else value
                encoded = encode(total, plan.codec)
                tensors |= {f"{channel}/{name}{suffix}": array for suffix, array in encoded.items()}
                if plan.codec.error_feedback:
                    lost.setdefault(channel, {})[name] = total - decode(encoded, plan.codec)
                elif channel == CONTROL:
                    sent.setdefault(channel, {})[name] = decode(encoded, plan.codec)
    return tensors, lost, sent


# ------------------------------------------------------------------------------------------ rules
def clients_of(closing: Closing) -> int:
    """SCAFFOLD's N: how many clients had work in the round, whether it counted or not."""
    return max(1, len({c.client for c in closing.counted} | {u.client for u in closing.uncounted}))
