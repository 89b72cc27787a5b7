"""Outer optimizers: from a merged update to the change of `public`, and the change applied. Exact, piece by piece.

Formulas, in fp32 with every operation rounded by itself; g is the merged update, which points uphill (start minus
end, or a gradient), and constants are rounded to fp32 once (vectors: tests/updates/make_vectors.py):

    sgd       step = g; with momentum m = m * mu + g, step = m
    nesterov  m = m * mu + g, step = g + m * mu                                   (torch's convention)
    adamw     m = m * b1 + g * (1 - b1), v = v * b2 + (g * g) * (1 - b2)
              step = (m / bias1) / (sqrt(v / bias2) + epsilon)                    (FedAdam, 2003.00295, bias = 1)
    change    -(step * lr) - public * (lr * decay)
    residual  intended = change + residual; residual = intended - decoded         (error feedback of the change)
    public    public + decoded

The control channel has no optimizer: its change is the merged change of the clients' control variates.

Everything works on named arrays in memory or in mapped files; inputs are never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from manyhands.coordination.types import OuterTerms
from manyhands.plan import wire
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import OuterOptimizer, Plan
from manyhands.updates.checks import decoded
from manyhands.updates.codecs import NUMPY, codec_of
from manyhands.updates.exact import F32, single
from manyhands.updates.segments import Segment, default_threads, for_each, segments
from manyhands.updates.types import Arrays


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """One step's constants in fp32."""

    lr: np.float32
    decay: np.float32
    momentum: np.float32
    beta1: np.float32
    rest1: np.float32
    beta2: np.float32
    rest2: np.float32
    epsilon: np.float32
    bias1: np.float32
    bias2: np.float32


def constants(outer: OuterOptimizer, terms: OuterTerms) -> Constants:
    """Differences and products are taken in fp64, then each is rounded to fp32."""
    return Constants(
        lr=single(terms.lr),
        decay=single(terms.lr * outer.weight_decay),
        momentum=single(outer.momentum),
        beta1=single(outer.beta1),
        rest1=single(1.0 - outer.beta1),
        beta2=single(outer.beta2),
        rest2=single(1.0 - outer.beta2),
        epsilon=single(outer.epsilon),
        bias1=single(terms.bias1),
        bias2=single(terms.bias2),
    )


def fresh_outer(plan: Plan, parameters: Sequence[Parameter]) -> dict[str, F32]:
    """Outer state before the first step: zeros, by the names of `wire.outer_schema`."""
    return {n: np.zeros(shape, np.float32) for n, (_, shape) in wire.outer_schema(plan, parameters).items()}


def advance_arrays(
    plan: Plan,
    parameters: Sequence[Parameter],
    terms: OuterTerms,
    *,
    merged: Arrays,
    public: Arrays,
    outer: Arrays,
    change_out: Arrays,
    outer_out: Arrays,
    public_out: Arrays | None = None,
    threads: int | None = None,
) -> None:
    """One outer step: fills the encoded change, the new outer state and, where given, the new public.

    Names: `merged` and `change_out` by channel (wire.change_schema), `public` as in a snapshot, outer state as in
    wire.outer_schema. `public_out` needs the parameters that are not trained as well; they are copied.
    """
    codec = plan.change_codec
    fixed = constants(plan.outer, terms)
    moments = wire.moment_names(plan.outer)

    def advance(channel: str, piece: Segment, scratch: F32) -> None:
        size = piece.stop - piece.start
        intended, other = scratch[0][:size], scratch[1][:size]
        update = piece.of(merged[f"{channel}/{piece.name}"])
        current = piece.of(public[public_name(channel, piece.name)])
        if channel == wire.MAIN:
            names = [f"{wire.OUTER}/{moment}/{piece.name}" for moment in moments]
            before, after = ([piece.of(state[name]) for name in names] for state in (outer, outer_out))
            _step(plan.outer, fixed, update, before, after, intended, other)
            _change(fixed, current, intended, other)
        else:
            np.copyto(intended, update)
        residual = f"{wire.OUTER}/{wire.RESIDUAL}/{channel}/{piece.name}"
        if codec.error_feedback:
            np.add(intended, piece.of(outer[residual]), out=intended)
        codec_of(codec).encode(intended, codec, piece.wire(change_out, channel, codec))
        sent = decoded(piece, change_out, channel, codec, other)
        if codec.error_feedback:
            np.subtract(intended, sent, out=piece.of(outer_out[residual]))
        if public_out is not None:
            np.add(current, sent, out=piece.of(public_out[public_name(channel, piece.name)]))

    pieces = segments(wire.trainable(parameters), codec)
    for channel in wire.channels(plan):
        for_each(pieces, partial(advance, channel), threads or default_threads(), rows=2)
    if public_out is not None:
        _copy_fixed(parameters, public, public_out)


def apply_arrays(
    plan: Plan,
    parameters: Sequence[Parameter],
    *,
    public: Arrays,
    change: Arrays,
    public_out: Arrays,
    threads: int | None = None,
) -> None:
    """public_out = public + decoded change: the same bits that `advance_arrays` gives for the same change."""
    codec = plan.change_codec

    def apply(channel: str, piece: Segment, scratch: F32) -> None:
        name = public_name(channel, piece.name)
        np.add(
            piece.of(public[name]),
            decoded(piece, change, channel, codec, scratch[0]),
            out=piece.of(public_out[name]),
        )

    pieces = segments(wire.trainable(parameters), codec)
    for channel in wire.channels(plan):
        for_each(pieces, partial(apply, channel), threads or default_threads(), rows=1)
    _copy_fixed(parameters, public, public_out)


def public_name(channel: str, parameter: str) -> str:
    """What a channel's change is added to, as snapshots name it."""
    return parameter if channel == wire.MAIN else f"{wire.CONTROL}/{parameter}"


def empty_like(schema: wire.Schema) -> dict[str, npt.NDArray[Any]]:
    """Uninitialized arrays of a schema, to be filled."""
    return {name: np.empty(shape, dtype=NUMPY[dtype]) for name, (dtype, shape) in schema.items()}


def _copy_fixed(parameters: Sequence[Parameter], public: Arrays, public_out: Arrays) -> None:
    for parameter in parameters:
        if not parameter.trainable and public_out[parameter.name] is not public[parameter.name]:
            np.copyto(public_out[parameter.name], public[parameter.name])


def _step(
    outer: OuterOptimizer,
    fixed: Constants,
    g: F32,
    before: Sequence[F32],
    after: Sequence[F32],
    step: F32,
    other: F32,
) -> None:
    """`step` and the moments `after` from g and the moments `before`; `other` is scratch."""
    if outer.name == "adamw":
        (m, v), (m_after, v_after) = before, after
        np.multiply(m, fixed.beta1, out=m_after)
        np.multiply(g, fixed.rest1, out=other)
        np.add(m_after, other, out=m_after)
        np.multiply(v, fixed.beta2, out=v_after)
        np.multiply(g, g, out=other)
        np.multiply(other, fixed.rest2, out=other)
        np.add(v_after, other, out=v_after)
        np.divide(v_after, fixed.bias2, out=other)
        np.sqrt(other, out=other)
        np.add(other, fixed.epsilon, out=other)
        np.divide(m_after, fixed.bias1, out=step)
        np.divide(step, other, out=step)
        return
    if not after:
        np.copyto(step, g)
        return
    np.multiply(before[0], fixed.momentum, out=after[0])
    np.add(after[0], g, out=after[0])
    if outer.name == "nesterov":
        np.multiply(after[0], fixed.momentum, out=step)
        np.add(g, step, out=step)
    else:
        np.copyto(step, after[0])


def _change(fixed: Constants, public: F32, step: F32, other: F32) -> None:
    """step becomes -(step * lr) - public * decay, in place."""
    np.multiply(step, fixed.lr, out=step)
    np.negative(step, out=step)
    if fixed.decay:
        np.multiply(public, fixed.decay, out=other)
        np.subtract(step, other, out=step)
