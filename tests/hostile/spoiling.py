"""What hostile clients do to the file of an honest update, and what is said of it, in a star and in a mesh."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np

Change = Callable[[bytes], bytes]


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file_of(header: Any, values: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    return len(text).to_bytes(8, "little") + text + values


def with_header(change: Callable[[dict[str, Any]], Any]) -> Change:
    def changed(data: bytes) -> bytes:
        header, values = header_of(data)
        return file_of(change(header) or header, values)

    return changed


def with_values(change: Callable[[np.ndarray], None]) -> Change:
    def changed(data: bytes) -> bytes:
        header, raw = header_of(data)
        values = np.frombuffer(raw, "<f4").copy()
        change(values)
        return file_of(header, values.tobytes())

    return changed


def _first(header: dict[str, Any], **fields: Any) -> None:
    header[min(header)].update(fields)


def _renamed(header: dict[str, Any]) -> dict[str, Any]:
    return {("delta/elsewhere" if name == min(header) else name): spec for name, spec in header.items()}


def _put(value: float, at: int = 7) -> Callable[[np.ndarray], None]:
    def put(values: np.ndarray) -> None:
        values[at] = value

    return put


AT_THE_DOOR: dict[str, tuple[Change, str]] = {
    "truncated": (lambda data: data[:-100], "bytes long; expected"),
    "truncated in its header": (lambda data: data[:20], "truncated"),
    "empty": (lambda _: b"", "truncated"),
    "a byte too long": (lambda data: data + b"\0", "bytes long; expected"),
    "noise": (lambda data: np.random.default_rng(1).bytes(len(data)), "truncated|header"),
    "a pickle": (lambda _: b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os\x94.", "truncated|header"),
    "another shape": (with_header(lambda h: _first(h, shape=[1500, 1])), "has shape [1500, 1]; expected [1500]"),
    "another dtype": (with_header(lambda h: _first(h, dtype="I32")), "has dtype I32; expected F32"),
    "another name": (with_header(_renamed), "lacks tensor 'delta/tensor00000'"),
    "overlapping tensors": (with_header(lambda h: h[max(h)].update(data_offsets=[0, 6000])), "no gaps, no overlap"),
    "metadata": (with_header(lambda h: {"__metadata__": {"a": "b"}, **h}), "carries metadata"),
    "a header that lies about its length": (lambda data: (2**40).to_bytes(8, "little") + data[8:], "truncated"),
    "deep nesting": (with_header(lambda _: {"a": {"b": {"c": {"d": 1}}}}), "nested"),
}  # fmt: skip

IN_THE_VALUES: dict[str, tuple[Change, str]] = {
    "not a number": (with_values(_put(math.nan)), "is nan at position 7; expected finite"),
    "infinity": (with_values(_put(-math.inf, 2999)), "is -inf at position 1499; expected finite"),
    "too large to add": (with_values(_put(3e38)), "2^60 at most"),
}
