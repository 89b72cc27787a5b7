"""The dummy task: no model and no torch. A worker sleeps and sends an update of the plan's size.

For tests and benches of everything around the work: rounds, blobs, aggregation. The update is a real one
(the plan's codec and schema, finite bounded values, its true norm in the claims), so nothing downstream
knows better. Its content is one block of pseudo-random values, repeated: it costs no more than writing the
file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from manyhands.coordination.types import Assignment, Claims
from manyhands.errors import PlanError
from manyhands.plan.descriptor import Parameter
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import DummyTask
from manyhands.plan.wire import MAIN, encode_header, layout, snapshot_schema, update_schema
from manyhands.tasks.protocol import Prepared, Task

FIRST_WEIGHTS = "first.safetensors"
LARGEST_VALUE = 1e-3
"""Bound of an update's values, so that any number of rounds stays finite."""

NO_MODEL = (
    "task.name is 'dummy', which has no model to train or evaluate: it tries out runs with clients, as in `manyhands "
    "server run --plan dummy`; give a task with a model here, such as task=language_model or task=grids"
)

_PATTERN_VALUES = 1 << 18
_NAP_S = 0.02  # how soon abandoned work is noticed


class DummyFamily:
    """How the dummy task is prepared; there is nothing to open."""

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """The parameter table and first weights of zeros. Raises PlanError for more tensors than
        parameters.
        """
        task = _settings(plan)
        parameters = parameter_table(task)
        directory.mkdir(parents=True, exist_ok=True)
        schema = snapshot_schema(plan, parameters)
        header = encode_header(schema)
        path = directory / FIRST_WEIGHTS
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + layout(schema).data_bytes)
        return Prepared(materials={}, samples=task.samples, parameters=parameters, first_weights=path)

    def open(self, plan: Plan, materials: Path) -> Task:  # noqa: ARG002 - the signature of TaskFamily
        raise PlanError(NO_MODEL)


FAMILY = DummyFamily()


def parameter_table(task: DummyTask) -> tuple[Parameter, ...]:
    """`task.parameters` fp32 values in `task.tensors` one-dimensional tensors of nearly equal size."""
    if task.tensors > task.parameters:
        raise PlanError(
            f"task.tensors is {task.tensors}, more than task.parameters {task.parameters}; use fewer"
        )
    size, more = divmod(task.parameters, task.tensors)
    return tuple(
        Parameter(name=f"tensor{i:05}", shape=(size + (1 if i < more else 0),)) for i in range(task.tensors)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pattern:
    """The bytes of a block of values as they travel, and for each prefix of values the sum of decoded
    squares.
    """

    data: bytes
    squares: npt.NDArray[np.float64]  # [values + 1], squares[n] of the first n

    def square_sum(self, count: int) -> float:
        blocks, rest = divmod(count, len(self.squares) - 1)
        return blocks * float(self.squares[-1]) + float(self.squares[rest])


class DummyWork:
    """The work of a dummy client: one instance per run and worker."""

    def __init__(self, plan: Plan, parameters: Sequence[Parameter]) -> None:
        self._delay_s = _settings(plan).delay_s
        self._schema = update_schema(plan, parameters)
        self._layout = layout(self._schema)

    def write_update(
        self, assignment: Assignment, path: Path, *, abandoned: Callable[[], bool] = lambda: False
    ) -> Claims | None:
        """Sleep, then write the update of `assignment` to `path`; the same assignment seed gives the same
        bytes.

        None, and no file, if `abandoned` came true meanwhile.
        """
        started = time.monotonic()
        while (left := started + self._delay_s - time.monotonic()) > 0:
            if abandoned():
                return None
            time.sleep(min(left, _NAP_S))
        patterns = _patterns(assignment.seed)
        square_sum = 0.0
        with path.open("wb") as file:
            file.write(encode_header(self._schema))
            for name, placed in self._layout.tensors.items():
                if abandoned():
                    path.unlink()
                    return None
                is_scale = name.endswith(".scale") and name.removesuffix(".scale") in self._schema
                pattern = patterns["scale" if is_scale else placed.dtype]
                _write_repeated(file, pattern.data, placed.bytes)
                if name.startswith(f"{MAIN}/"):
                    square_sum += pattern.square_sum(math.prod(placed.shape))
        return Claims(
            norm=math.sqrt(square_sum),
            samples=sum(len(piece) for piece in assignment.ranges)
            or assignment.steps * assignment.batch_size,
            work_ms=round((time.monotonic() - started) * 1000),
        )


def _settings(plan: Plan) -> DummyTask:
    if not isinstance(plan.task, DummyTask):
        raise PlanError(f"task.name is {plan.task.name!r}, and this is the family of dummy")
    return plan.task


def _patterns(seed: int) -> dict[str, _Pattern]:
    """By safetensors dtype, and "scale" for the scales of int8 blocks, which are all the same."""
    values = np.random.default_rng(seed).uniform(-LARGEST_VALUE, LARGEST_VALUE, _PATTERN_VALUES).astype("<f4")
    halves = (values.view("<u4") >> 16).astype("<u2")  # bf16 by truncation
    from_halves = (halves.astype("<u4") << 16).view("<f4")
    scale = np.float32(LARGEST_VALUE / 127)
    bytes_ = np.rint(values / scale).astype(np.int8)
    from_bytes = bytes_.astype(np.float32) * scale
    return {
        "F32": _pattern(values, values),
        "BF16": _pattern(halves, from_halves),
        "I8": _pattern(bytes_, from_bytes),
        "scale": _pattern(
            np.full(_PATTERN_VALUES, scale, dtype="<f4"), np.zeros(_PATTERN_VALUES, np.float32)
        ),
    }


def _pattern(raw: npt.NDArray[np.generic], decoded: npt.NDArray[np.float32]) -> _Pattern:
    squares = np.concatenate([np.zeros(1), np.cumsum(np.square(decoded.astype(np.float64)))])
    return _Pattern(data=raw.tobytes(), squares=squares)


def _write_repeated(file: BinaryIO, pattern: bytes, size: int) -> None:
    whole, rest = divmod(size, len(pattern))
    for _ in range(whole):
        file.write(pattern)
    file.write(memoryview(pattern)[:rest])
