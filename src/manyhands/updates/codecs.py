"""Codecs: how one flat fp32 tensor becomes wire tensors and back. One registry, one class each, no state.

A codec works on segments whose start is a multiple of its block, so a tensor can be encoded and decoded piece by
piece with the same result. Encoding may lose; decoding is exact arithmetic and agrees bit for bit everywhere. What
encoding lost is error feedback's business (functions.py, outer.py).

Wire arrays are numpy's: fp32, int8, and uint16 for bf16 bits. Values must be finite; `encode` does not look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from manyhands.errors import PlanError
from manyhands.plan import wire
from manyhands.plan.schema import Codec as CodecSettings
from manyhands.plan.wire import TensorSpec
from manyhands.updates.exact import F32

Wire = Mapping[str, npt.NDArray[Any]]
"""Wire tensors of one parameter by suffix: "" for the values, ".scale" for int8's scales."""


class Codec(Protocol):
    """One way to encode. `settings` is the plan's section; it names block sizes."""

    def schema(self, shape: tuple[int, ...], settings: CodecSettings) -> dict[str, TensorSpec]:
        """dtype and shape of the wire tensors of one parameter, by suffix."""
        ...

    def parts(self, start: int, stop: int, settings: CodecSettings) -> dict[str, slice]:
        """Where in each flat wire tensor the elements [start, stop) are; `start` is a multiple of the block."""
        ...

    def encode(self, values: F32, settings: CodecSettings, out: Wire) -> None:
        """Encode a flat segment into wire arrays of the right length."""
        ...

    def decode(self, wire: Wire, settings: CodecSettings, out: F32) -> None:
        """Decode a segment's wire arrays into flat fp32. `out` must not overlap them."""
        ...


class Dense32:
    """fp32 as it is."""

    def schema(self, shape: tuple[int, ...], settings: CodecSettings) -> dict[str, TensorSpec]:
        return wire.encoded_schema(settings, "", shape)

    def parts(self, start: int, stop: int, settings: CodecSettings) -> dict[str, slice]:  # noqa: ARG002
        return {"": slice(start, stop)}

    def encode(self, values: F32, settings: CodecSettings, out: Wire) -> None:  # noqa: ARG002
        np.copyto(out[""], values)

    def decode(self, wire: Wire, settings: CodecSettings, out: F32) -> None:  # noqa: ARG002
        np.copyto(out, wire[""])


class Dense16(Dense32):
    """bf16: the upper half of the fp32 bits, rounded to nearest, ties to even. Large values become infinite."""

    def encode(self, values: F32, settings: CodecSettings, out: Wire) -> None:  # noqa: ARG002
        bits = values.view(np.uint32)
        odd = np.right_shift(bits, 16)
        np.bitwise_and(odd, 1, out=odd)
        np.add(odd, 0x7FFF, out=odd)
        np.add(odd, bits, out=odd)
        np.right_shift(odd, 16, out=odd)
        np.copyto(out[""], odd, casting="unsafe")

    def decode(self, wire: Wire, settings: CodecSettings, out: F32) -> None:  # noqa: ARG002
        bits = out.view(np.uint32)
        np.copyto(bits, wire[""])
        np.left_shift(bits, 16, out=bits)


class Int8Blocks:
    """int8 with one fp32 scale for each `block` values, the last block short.

    scale = absmax / 127; q = round half even of value / scale, held in -127..127, 0 where the scale is 0;
    decoded = q * scale. Each is one fp32 operation.
    """

    def schema(self, shape: tuple[int, ...], settings: CodecSettings) -> dict[str, TensorSpec]:
        return wire.encoded_schema(settings, "", shape)

    def parts(self, start: int, stop: int, settings: CodecSettings) -> dict[str, slice]:
        block = settings.block
        assert start % block == 0
        return {"": slice(start, stop), ".scale": slice(start // block, -(-stop // block))}

    def encode(self, values: F32, settings: CodecSettings, out: Wire) -> None:
        for part, scale, quantized in self._rows(values, out, settings.block):
            np.divide(np.abs(part).max(axis=1), np.float32(127), out=scale)
            spread = scale[:, None]
            ratio = np.divide(part, spread, out=np.zeros_like(part), where=spread != 0)
            np.rint(ratio, out=ratio)
            np.clip(ratio, np.float32(-127), np.float32(127), out=ratio)
            np.copyto(quantized, ratio, casting="unsafe")

    def decode(self, wire: Wire, settings: CodecSettings, out: F32) -> None:
        for part, scale, quantized in self._rows(out, wire, settings.block):
            np.copyto(part, quantized)
            np.multiply(part, scale[:, None], out=part)

    @staticmethod
    def _rows(values: F32, wire: Wire, block: int) -> list[tuple[F32, F32, npt.NDArray[np.int8]]]:
        """(values, scales, quantized) as rows of whole blocks, then the short last block as a row, all views."""
        whole = values.size // block * block
        rows = []
        if whole:
            scale = wire[".scale"][: whole // block]
            rows.append((values[:whole].reshape(-1, block), scale, wire[""][:whole].reshape(-1, block)))
        if whole < values.size:
            scale = wire[".scale"][whole // block :]
            rows.append((values[whole:].reshape(1, -1), scale, wire[""][whole:].reshape(1, -1)))
        return rows


CODECS: Final[Mapping[str, Codec]] = {"fp32": Dense32(), "bf16": Dense16(), "int8": Int8Blocks()}
"""By the name that a plan uses. A new codec is a class here, a name in plan/schema.py, a row in plan/wire.py."""


def codec_of(settings: CodecSettings) -> Codec:
    try:
        return CODECS[settings.name]
    except KeyError:
        raise PlanError(f"codec is '{settings.name}'; expected one of {', '.join(CODECS)}") from None


def encode(values: npt.NDArray[np.float32], settings: CodecSettings) -> dict[str, npt.NDArray[Any]]:
    """Wire tensors of one whole parameter by suffix, newly allocated, in the shapes of the schema."""
    made = {
        suffix: np.empty(shape, dtype=NUMPY[dtype])
        for suffix, (dtype, shape) in codec_of(settings).schema(values.shape, settings).items()
    }
    flat = np.ascontiguousarray(values).reshape(-1)
    codec_of(settings).encode(flat, settings, {suffix: array.reshape(-1) for suffix, array in made.items()})
    return made


def decode(wire: Wire, settings: CodecSettings) -> F32:
    """One whole parameter from its wire tensors, newly allocated."""
    out = np.empty(wire[""].shape, dtype=np.float32)
    flat = {suffix: np.ascontiguousarray(array).reshape(-1) for suffix, array in wire.items()}
    codec_of(settings).decode(flat, settings, out.reshape(-1))
    return out


NUMPY: Final[Mapping[str, npt.DTypeLike]] = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""numpy's dtype for safetensors' names; bf16 as its bits."""
