"""What travels between participants, as tensors with names, dtypes and shapes, and the check of a file's header.

Files are safetensors: 8 bytes of length, a JSON header, the data. From a plan and the parameter table follows the
schema of every file: an update, the published change, a snapshot, the outer state. The canonical layout has the
wider dtypes first and names in order of code points within a dtype, without gaps, so one schema has one layout.
The bytes of a snapshot's data are then exactly those that the fingerprint covers.

Here because programs without torch (server, client node) check headers before anybody reads a value. Nothing is
allocated by what a header says: it is compared with what the plan says.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manyhands.errors import PlanError, UpdateError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Codec, OuterOptimizer, Plan

MAIN: Final = "delta"
"""Channel of every update: start minus end of the local work, or the gradient."""
CONTROL: Final = "control"
"""Channel of SCAFFOLD: the change of the client's control variate."""
OUTER: Final = "outer"
"""Prefix of the outer optimizer's tensors in a file."""
RESIDUAL: Final = "residual"
"""What the codec of the published change has lost so far, under OUTER, then by channel."""

ITEM_BYTES: Final[Mapping[str, int]] = {
    "F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of one element, by safetensors' names of dtypes."""

TensorSpec = tuple[str, tuple[int, ...]]
"""dtype as safetensors names it, and shape."""
Schema = Mapping[str, TensorSpec]

_PREFIX_BYTES = 8
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_DEEPEST = 3  # {"name": {"shape": [..]}}


# ------------------------------------------------------------------------------------------ schemas
def channels(plan: Plan) -> tuple[str, ...]:
    """The channels of an update and of the published change, in order."""
    return (MAIN, CONTROL) if plan.local.control_variate else (MAIN,)


def trainable(parameters: Sequence[Parameter]) -> list[Parameter]:
    """The parameters that travel, sorted by name: the order of everything flat."""
    return sorted((p for p in parameters if p.trainable), key=lambda p: p.name)


def moment_names(outer: OuterOptimizer) -> tuple[str, ...]:
    """The outer optimizer's state: names of the moments, each shaped like the trainable weights."""
    if outer.name == "adamw":
        return ("first", "second")
    return ("momentum",) if outer.name == "nesterov" or outer.momentum > 0 else ()


def encoded_schema(codec: Codec, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """The tensors in which one fp32 tensor travels under a codec, by full name."""
    if codec.name == "int8":
        blocks = -(-math.prod(shape) // codec.block)
        return {name: ("I8", shape), f"{name}.scale": ("F32", (blocks,))}
    return {name: ("BF16" if codec.name == "bf16" else "F32", shape)}


def update_schema(plan: Plan, parameters: Sequence[Parameter]) -> dict[str, TensorSpec]:
    """A client's update: `<channel>/<parameter>`, and `<channel>/<parameter>.scale` for int8."""
    return _by_channel(plan, parameters, plan.codec)


def change_schema(plan: Plan, parameters: Sequence[Parameter]) -> dict[str, TensorSpec]:
    """The change of `public` that the aggregator publishes."""
    return _by_channel(plan, parameters, plan.change_codec)


def outer_schema(plan: Plan, parameters: Sequence[Parameter]) -> dict[str, TensorSpec]:
    """Outer state: `outer/<moment>/<parameter>`, and `outer/residual/<channel>/<parameter>` where it is kept."""
    moments = [
        f"{OUTER}/{moment}/{p.name}" for moment in moment_names(plan.outer) for p in trainable(parameters)
    ]
    if plan.change_codec.error_feedback:
        moments += [f"{OUTER}/{RESIDUAL}/{c}/{p.name}" for c in channels(plan) for p in trainable(parameters)]
    shapes = {p.name: p.shape for p in parameters}
    return _distinct((name, ("F32", _shape_of(name, shapes))) for name in moments)


def snapshot_schema(
    plan: Plan, parameters: Sequence[Parameter], *, outer: bool = False
) -> dict[str, TensorSpec]:
    """`public`: every parameter under its name, the control variate under `control/`; `outer` adds outer state."""
    for p in parameters:
        if p.name.startswith((f"{CONTROL}/", f"{OUTER}/")):
            raise PlanError(
                f"parameter '{p.name}' would be taken for shared state; rename that module of the model"
            )
    public: list[tuple[str, TensorSpec]] = [(p.name, ("F32", p.shape)) for p in parameters]
    if plan.local.control_variate:
        public += [(f"{CONTROL}/{p.name}", ("F32", p.shape)) for p in trainable(parameters)]
    return _distinct([*public, *(outer_schema(plan, parameters).items() if outer else ())])


def maximum_bytes(plan: Plan, parameters: Sequence[Parameter]) -> int:
    """The largest file that can be an update of this plan; whatever is larger need not be read."""
    schema = update_schema(plan, parameters)
    return _PREFIX_BYTES + _header_limit(schema) + layout(schema).data_bytes


def _by_channel(plan: Plan, parameters: Sequence[Parameter], codec: Codec) -> dict[str, TensorSpec]:
    travelling = trainable(parameters)
    if not travelling:
        raise PlanError("no parameter is trainable; expected at least one: look at the model's requires_grad")
    return _distinct(
        item
        for channel in channels(plan)
        for p in travelling
        for item in encoded_schema(codec, f"{channel}/{p.name}", p.shape).items()
    )


def _distinct(items: Iterable[tuple[str, TensorSpec]]) -> dict[str, TensorSpec]:
    schema: dict[str, TensorSpec] = {}
    for name, spec in items:
        if name in schema or name == "__metadata__":
            raise PlanError(
                f"two tensors of one file would be called '{name}'; rename that parameter of the model"
            )
        schema[name] = spec
    return schema


def _shape_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of `outer/<moment>/<parameter>` or `outer/residual/<channel>/<parameter>`."""
    parts = 3 if name.startswith(f"{OUTER}/{RESIDUAL}/") else 2
    return shapes[name.split("/", parts)[parts]]


# ------------------------------------------------------------------------------------------ layout
@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One tensor in a file: `start` counts bytes from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each tensor lies; `tensors` in the order of the file. `data_start` is the header's end in the file."""

    tensors: Mapping[str, Placed]
    data_bytes: int
    data_start: int = 0
    metadata: Mapping[str, str]


def layout(schema: Schema) -> Layout:
    """The canonical layout: wider dtypes first, then by name, without gaps."""
    tensors: dict[str, Placed] = {}
    position = 0
    for name in sorted(schema, key=lambda name: (-ITEM_BYTES[schema[name][0]], name)):
        dtype, shape = schema[name]
        tensors[name] = Placed(dtype=dtype, shape=shape, start=position)
        position += tensors[name].bytes
    return Layout(tensors=tensors, data_bytes=position, metadata={})


def encode_header(schema: Schema, metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and JSON of the canonical layout, padded so that the data starts at a multiple of 64 bytes."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, placed in layout(schema).tensors.items():
        offsets = [placed.start, placed.start + placed.bytes]
        entries[name] = {"dtype": placed.dtype, "shape": list(placed.shape), "data_offsets": offsets}
    body = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-(len(body) + _PREFIX_BYTES) % 64)
    return len(body).to_bytes(_PREFIX_BYTES, "little") + body


def _header_limit(schema: Schema) -> int:
    """What another writer may use for the same header: other spacing, escapes, padding."""
    return 2 * len(encode_header(schema)) + 1024


# ------------------------------------------------------------------------------------------ checking
def check_header(
    source: Path | bytes, schema: Schema, *, total_bytes: int | None = None, metadata: bool = False
) -> Layout:
    """The layout of a file that has exactly this schema in the canonical layout; UpdateError says what differs.

    `source` is a file, or its first bytes: the header at least, with the file's whole size in `total_bytes`.
    `metadata`: whether the header may carry some, as the files of other programs do. Reads the header only; values
    are checked where they are read.
    """
    found = parse_header(source, limit_bytes=_header_limit(schema), total_bytes=total_bytes)
    where = str(source) if isinstance(source, Path) else "the header"
    if found.metadata and not metadata:
        raise UpdateError(
            f"{where} carries metadata ({', '.join(sorted(found.metadata))[:80]}); expected none"
        )
    expected = layout(schema)
    if missing := expected.tensors.keys() - found.tensors.keys():
        raise UpdateError(
            f"{where} lacks tensor '{min(missing)}' ({len(missing)} in all) that the plan expects"
        )
    if extra := found.tensors.keys() - expected.tensors.keys():
        raise UpdateError(
            f"{where} has tensor '{min(extra)[:80]}' ({len(extra)} in all) that the plan does not name"
        )
    for name, want in expected.tensors.items():
        have = found.tensors[name]
        if have.dtype != want.dtype:
            raise UpdateError(f"{where}: '{name}' has dtype {have.dtype}; expected {want.dtype}")
        if have.shape != want.shape:
            raise UpdateError(f"{where}: '{name}' has shape {list(have.shape)}; expected {list(want.shape)}")
        if have.start != want.start:
            raise UpdateError(
                f"{where}: '{name}' starts at byte {have.start} of the data; expected {want.start}"
            )
    return found


def parse_header(source: Path | bytes, *, limit_bytes: int, total_bytes: int | None = None) -> Layout:
    """The layout that a file states, if it is sound in itself: contiguous tensors that end where the file ends.

    `limit_bytes` bounds the header. Raises UpdateError.
    """
    raw, total, where = _header_bytes(source, limit_bytes, total_bytes)
    entries = _json_object(raw, where)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise UpdateError(f"{where}: __metadata__ is not an object of strings")
    read = ((name, _entry(name, entry, where)) for name, entry in entries.items())
    tensors = dict(sorted(read, key=lambda item: (item[1].start, item[1].bytes)))
    position = 0
    for name, placed in tensors.items():
        if placed.start != position:
            raise UpdateError(
                f"{where}: '{name}' starts at byte {placed.start}; expected {position}: no gaps, no overlap"
            )
        position += placed.bytes
    data_start = _PREFIX_BYTES + len(raw)
    if data_start % 8:
        raise UpdateError(f"{where}: the header is {len(raw)} bytes long; expected a multiple of 8")
    if data_start + position != total:
        raise UpdateError(f"{where} is {total} bytes long; expected {data_start + position} from its header")
    return Layout(tensors=tensors, data_bytes=position, data_start=data_start, metadata=metadata)


def _header_bytes(source: Path | bytes, limit_bytes: int, total_bytes: int | None) -> tuple[bytes, int, str]:
    """The JSON's bytes, the file's size, and what to call the file in an error."""
    limit = min(limit_bytes, _LARGEST_HEADER)
    if isinstance(source, bytes):
        start, total, where = source, len(source) if total_bytes is None else total_bytes, "the header"
    else:
        where = str(source)
        with source.open("rb") as file:
            start = file.read(_PREFIX_BYTES + limit)
            total = os.fstat(file.fileno()).st_size
    length = int.from_bytes(start[:_PREFIX_BYTES], "little")
    if len(start) < _PREFIX_BYTES or length > total - _PREFIX_BYTES:
        raise UpdateError(f"{where} is truncated: {total} bytes, too short for its own header")
    if length > limit:
        raise UpdateError(f"{where} states a header of {length} bytes; expected {limit} at most")
    if len(start) < _PREFIX_BYTES + length:
        raise UpdateError(f"{where}: {len(start)} bytes given; expected the whole header of {length + 8}")
    return start[_PREFIX_BYTES : _PREFIX_BYTES + length], total, where


def _json_object(raw: bytes, where: str) -> dict[str, Any]:
    depth = deepest = 0
    for bracket in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", raw):
        depth += (bracket in b"{[") - (bracket in b"}]")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise UpdateError(f"{where}: the header is nested {deepest} deep; expected {_DEEPEST} at most")
    try:
        entries = json.loads(
            raw.decode(), object_pairs_hook=_unique, parse_float=_no_number, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        raise UpdateError(f"{where}: the header is not the JSON of a safetensors file: {error}") from None
    if not isinstance(entries, dict):
        raise UpdateError(f"{where}: the header is a JSON {type(entries).__name__}; expected an object")
    return entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"'{text[:20]}' is not an integer")


def _entry(name: str, entry: Any, where: str) -> Placed:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise UpdateError(f"{where}: '{name[:80]}' does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UpdateError(
            f"{where}: '{name[:80]}' has dtype {dtype!r}; expected one of {', '.join(ITEM_BYTES)}"
        )
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise UpdateError(f"{where}: {what} of '{name[:80]}' is not a list of sizes")
    if len(offsets) != 2:
        raise UpdateError(f"{where}: data_offsets of '{name[:80]}' has {len(offsets)} numbers; expected 2")
    if len(shape) > 64:
        raise UpdateError(f"{where}: '{name[:80]}' has {len(shape)} dimensions; expected 64 at most")
    placed = Placed(dtype=dtype, shape=tuple(shape), start=offsets[0])
    if offsets[1] - offsets[0] != placed.bytes:
        raise UpdateError(
            f"{where}: '{name[:80]}' takes bytes {offsets}; expected {placed.bytes} bytes from its dtype and shape"
        )
    return placed
