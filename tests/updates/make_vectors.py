"""Makes the conformance vectors of exact arithmetic, from integers and exact fractions alone.

An implementation that shares nothing with the project's: every fp32 operation is carried out on exact
fractions and rounded once, half to even, by `rounded`. Run it to write the files again:

    python tests/updates/make_vectors.py

What the vectors state:

fingerprint  k_i = splitmix64(i) | 1, where splitmix64(i) is one output of the generator with state i, and i is
             the position, in 4-byte elements, within a block of 4 MiB of the concatenation of all tensors,
             sorted by name (code points), as little-endian bytes. Per block: sum of bits_i * k_i mod 2^64. The
             fingerprint is the SHA-256 of the block sums, each as 8 little-endian bytes.
bf16         the upper half of the fp32 bits, rounded to nearest, ties to even.
int8         per block of values: scale = absmax / 127; q = round half even of value / scale, held in
             -127..127, 0 where the scale is 0; decoded = q * scale. Each operation is rounded to fp32.
merge        sum = +0; for each update in order: sum = sum + ((x * factor) * weight); merged = sum / (sum of
             weights). factor, weight and the sum of weights are each rounded to fp32 once.
outer        g is the merged update; constants (1 - beta, lr * decay) are computed in fp64 and rounded to fp32
             once.
             sgd       step = g, with momentum: m = m * mu + g, step = m
             nesterov  m = m * mu + g; step = g + m * mu
             adamw     m = m * b1 + g * (1 - b1); v = v * b2 + (g * g) * (1 - b2);
                       step = (m / bias1) / (sqrt(v / bias2) + epsilon)
             change = -(step * lr), with decay: change = -(step * lr) - public * (lr * decay)
             with error feedback: intended = change + residual; residual = intended - decoded(intended)
             public = public + decoded change
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from math import isqrt
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "vectors"
SIGN = 1 << 31
MASK64 = (1 << 64) - 1
BLOCK_ELEMENTS = (4 << 20) // 4

Bits = int


# ------------------------------------------------------------------------------------ fp32 from fractions
def magnitude(bits: Bits) -> Fraction:
    exponent, mantissa = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if exponent == 255:
        raise ValueError(f"{bits:08x} is not finite")
    if exponent:
        mantissa += 1 << 23
    return Fraction(mantissa) * Fraction(2) ** (max(exponent, 1) - 150)


def value(bits: Bits) -> Fraction:
    return -magnitude(bits) if bits & SIGN else magnitude(bits)


def floor_log2(number: Fraction) -> int:
    guess = number.numerator.bit_length() - number.denominator.bit_length()
    return guess if Fraction(2) ** guess <= number else guess - 1


def rounded(number: Fraction, zero_sign: int = 0) -> Bits:
    """The nearest fp32, ties to even; an exact zero takes `zero_sign`."""
    if number == 0:
        return zero_sign
    sign = SIGN if number < 0 else 0
    exponent = max(floor_log2(abs(number)), -126)
    units = round(abs(number) / Fraction(2) ** (exponent - 23))
    bits = ((exponent + 126) << 23) + units
    if bits >= 0x7F800000:
        raise ValueError(f"{float(number)} overflows fp32")
    return sign | bits


def single(number: float) -> Bits:
    return rounded(Fraction(number), SIGN if str(number).startswith("-") else 0)


def add(a: Bits, b: Bits) -> Bits:
    return rounded(value(a) + value(b), a & b & SIGN)


def negated(a: Bits) -> Bits:
    return a ^ SIGN


def sub(a: Bits, b: Bits) -> Bits:
    return add(a, negated(b))


def mul(a: Bits, b: Bits) -> Bits:
    sign = (a ^ b) & SIGN
    return rounded(value(a) * value(b), sign) | sign


def div(a: Bits, b: Bits) -> Bits:
    sign = (a ^ b) & SIGN
    return rounded(value(a) / value(b), sign) | sign


def root(a: Bits) -> Bits:
    """Square root, rounded once: an integer root with 64 spare bits and a sticky bit below them."""
    number = value(a)
    if number == 0:
        return a
    shift = 2 * (64 - floor_log2(number) // 2)
    scaled = number * Fraction(2) ** shift
    whole = scaled.numerator // scaled.denominator
    base = isqrt(whole)
    exact = base * base == scaled
    return rounded((Fraction(base) + (0 if exact else Fraction(1, 2))) / Fraction(2) ** (shift // 2))


# ------------------------------------------------------------------------------------ fingerprint and codecs
def splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def fingerprint(tensors: dict[str, Sequence[Bits]]) -> tuple[list[int], str]:
    sums: list[int] = []
    position = BLOCK_ELEMENTS
    for name in sorted(tensors):
        for bits in tensors[name]:
            if position == BLOCK_ELEMENTS:
                sums.append(0)
                position = 0
            sums[-1] = (sums[-1] + bits * (splitmix64(position) | 1)) & MASK64
            position += 1
    return sums, hashlib.sha256(b"".join(s.to_bytes(8, "little") for s in sums)).hexdigest()


def to_bf16(bits: Bits) -> int:
    sign, number = (bits >> 16) & 0x8000, magnitude(bits)
    if number == 0:
        return sign
    exponent = max(floor_log2(number), -126)
    upper = ((exponent + 126) << 7) + round(number / Fraction(2) ** (exponent - 7))
    return sign | upper


def to_int8(values: Sequence[Bits], block: int) -> tuple[list[Bits], list[int], list[Bits]]:
    scales: list[Bits] = []
    quantized: list[int] = []
    decoded: list[Bits] = []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        largest = max((bits & ~SIGN for bits in part), key=magnitude)
        scale = div(largest, single(127.0))
        scales.append(scale)
        for bits in part:
            q = 0 if scale == 0 else round(value(div(bits, scale)))
            q = max(-127, min(127, q))
            quantized.append(q)
            decoded.append(mul(rounded(Fraction(q)), scale))
    return scales, quantized, decoded


# ------------------------------------------------------------------------------------ merge and outer steps
def merge(updates: Sequence[Sequence[Bits]], weights: Sequence[int], factors: Sequence[float]) -> list[Bits]:
    total = [0] * len(updates[0])
    for update, weight, factor in zip(updates, weights, factors, strict=True):
        for i, x in enumerate(update):
            total[i] = add(total[i], mul(mul(x, single(factor)), rounded(Fraction(weight))))
    divisor = rounded(Fraction(sum(weights)))
    return [div(x, divisor) for x in total]


def outer_step(
    settings: dict[str, Any], terms: dict[str, float], state: dict[str, list[Bits]], gradient: Sequence[Bits]
) -> list[Bits]:
    """The change of public; `state` holds public and the moments, and the moments move."""
    mu, lr, eps = single(settings["momentum"]), single(terms["lr"]), single(settings["epsilon"])
    b1, b1_rest = single(settings["beta1"]), single(1.0 - settings["beta1"])
    b2, b2_rest = single(settings["beta2"]), single(1.0 - settings["beta2"])
    decay = terms["lr"] * settings["weight_decay"]
    changes = []
    for i, g in enumerate(gradient):
        step = g
        if "momentum" in state:
            m = state["momentum"][i] = add(mul(state["momentum"][i], mu), g)
            step = add(g, mul(m, mu)) if settings["name"] == "nesterov" else m
        if settings["name"] == "adamw":
            m = state["first"][i] = add(mul(state["first"][i], b1), mul(g, b1_rest))
            v = state["second"][i] = add(mul(state["second"][i], b2), mul(mul(g, g), b2_rest))
            step = div(div(m, single(terms["bias1"])), add(root(div(v, single(terms["bias2"]))), eps))
        change = negated(mul(step, lr))
        if decay:
            change = sub(change, mul(state["public"][i], single(decay)))
        changes.append(change)
    return changes


# ------------------------------------------------------------------------------------ the cases
def hexed(values: Iterable[Bits]) -> str:
    """fp32 bits as big-endian hex digits, eight for each value."""
    return "".join(f"{bits:08x}" for bits in values)


def normal(source: random.Random, count: int, scale: float = 1.0) -> list[Bits]:
    return [single(source.gauss(0.0, scale)) for _ in range(count)]


EDGES = [0, SIGN, 1, SIGN | 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x00400001, 0x33D6BF95]


def formula(start: int, count: int) -> list[Bits]:
    """Bits that a reader can make by itself: (2654435761 * i + 12345) mod 2^32 for i from `start`."""
    return [(2654435761 * i + 12345) & 0xFFFFFFFF for i in range(start, start + count)]


FINGERPRINTS: list[dict[str, tuple[int, int]]] = [
    {"w": (0, 1)},
    {"b": (7, 5), "a": (100, 11), "B": (3, 2)},
    {"x.weight": (0, BLOCK_ELEMENTS)},
    {"late": (5, 70), "early": (11, BLOCK_ELEMENTS - 3), "middle": (1 << 31, BLOCK_ELEMENTS + 9)},
]


def fingerprint_vectors() -> list[dict[str, Any]]:
    """Tensors by name as (start, count) of `formula`."""
    cases = []
    for tensors in FINGERPRINTS:
        sums, digest = fingerprint({name: formula(*where) for name, where in tensors.items()})
        cases.append({"tensors": tensors, "blocks": [f"{s:016x}" for s in sums], "fingerprint": digest})
    return cases


def bf16_vectors() -> list[dict[str, Any]]:
    source = random.Random(2)
    halves = [0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001, 0x3F807FFF, 0x00008000, 0x00018000, 0x7F7F0000]
    values = EDGES + halves + normal(source, 46, 3.0)
    return [{"values": hexed(values), "bf16": "".join(f"{to_bf16(v):04x}" for v in values)}]


def int8_vectors() -> list[dict[str, Any]]:
    source = random.Random(3)
    ties = [single(x) for x in (127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 63.5, -127.0, 0.0)]
    cases = []
    for block, values in (
        (16, normal(source, 40)),
        (16, [*ties, SIGN, 0, single(3.5), single(0.001)]),
        (16, [0] * 16 + EDGES + [SIGN] * 3),
        (17, [1, 5, SIGN | 130, 63, 64, SIGN | 300, 127, *normal(source, 30, 1e-42)]),
        (32, normal(source, 70, 1e30) + normal(source, 3, 1e-30)),
    ):
        scales, quantized, decoded = to_int8(values, block)
        cases.append(
            {
                "block": block,
                "values": hexed(values),
                "scales": hexed(scales),
                "quantized": quantized,
                "decoded": hexed(decoded),
            }
        )
    return cases


def merge_vectors() -> list[dict[str, Any]]:
    source = random.Random(4)
    cases = []
    for weights, factors in (
        ([1], [1.0]),
        ([1, 1, 1], [1.0, 1.0, 1.0]),
        ([360, 120, 7, 1], [1.0, 0.3, 1.0, 0.9999999]),
        ([(1 << 24) + 1, 3, (1 << 30) + 65], [1.0, 0.1, 1.0]),
    ):
        updates = [normal(source, 30, 10.0 ** source.uniform(-4, 2)) + EDGES for _ in weights]
        cases.append(
            {
                "updates": [hexed(update) for update in updates],
                "weights": weights,
                "factors": [factor.hex() for factor in factors],
                "merged": hexed(merge(updates, weights, factors)),
            }
        )
    return cases


BASE = {"lr": 0.7, "momentum": 0.0, "beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.0}
OUTERS: list[dict[str, Any]] = [
    BASE | {"name": "sgd", "lr": 1.0},
    BASE | {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    BASE | {"name": "nesterov", "momentum": 0.9},
    BASE | {"name": "nesterov", "momentum": 0.5, "weight_decay": 0.1},
    BASE | {"name": "adamw", "lr": 1e-3, "bias_correction": True, "weight_decay": 0.1},
    BASE | {"name": "adamw", "lr": 1e-2, "bias_correction": False, "epsilon": 1e-3, "beta2": 0.999},
    BASE | {"name": "nesterov", "momentum": 0.9, "int8_block": 16},
    BASE | {"name": "adamw", "lr": 1e-2, "bias_correction": True, "int8_block": 16},
]
MOMENTS = {"sgd": ["momentum"], "nesterov": ["momentum"], "adamw": ["first", "second"]}


def outer_vectors() -> list[dict[str, Any]]:
    source = random.Random(5)
    cases = []
    for settings in OUTERS:
        names = [] if settings["name"] == "sgd" and not settings["momentum"] else MOMENTS[settings["name"]]
        block = settings.get("int8_block")
        state = {"public": normal(source, 32) + EDGES} | {name: [0] * 42 for name in names}
        if block:
            state["residual"] = [0] * 42
        case: dict[str, Any] = {"settings": settings, "public": hexed(state["public"]), "steps": []}
        for t in range(1, 5):
            corrected = settings.get("bias_correction", False)
            terms = {
                "lr": settings["lr"] / t,
                "bias1": 1.0 - settings["beta1"] ** t if corrected else 1.0,
                "bias2": 1.0 - settings["beta2"] ** t if corrected else 1.0,
            }
            gradient = [*normal(source, 30, 0.1), 0, SIGN, *EDGES]
            change = outer_step(settings, terms, state, gradient)
            if block:
                intended = [add(c, r) for c, r in zip(change, state["residual"], strict=True)]
                change = to_int8(intended, block)[2]
                state["residual"] = [sub(i, d) for i, d in zip(intended, change, strict=True)]
            state["public"] = [add(p, c) for p, c in zip(state["public"], change, strict=True)]
            case["steps"].append(
                {"terms": {name: number.hex() for name, number in terms.items()}, "merged": hexed(gradient)}
                | {name: hexed(values) for name, values in state.items()}
            )
        cases.append(case)
    return cases


VECTORS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "fingerprint": fingerprint_vectors,
    "bf16": bf16_vectors,
    "int8": int8_vectors,
    "merge": merge_vectors,
    "outer": outer_vectors,
}


def written(cases: list[dict[str, Any]]) -> str:
    return json.dumps(cases, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    HERE.mkdir(exist_ok=True)
    for name, make in VECTORS.items():
        (HERE / f"{name}.json").write_text(written(make()))
