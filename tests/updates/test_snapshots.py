"""Names of public and outer state, and snapshots as files."""

from __future__ import annotations

import numpy as np
import pytest

from manyhands.errors import UpdateError
from manyhands.plan import wire
from manyhands.updates import snapshots
from manyhands.updates.types import Outer, Public


def array(value, *shape):
    return np.full(shape, value, np.float32)


def test_names_there_and_back():
    public = Public(weights={"a": array(1, 2), "b/c": array(2, 1)}, control={"a": array(3, 2)})
    named = snapshots.public_arrays(public)
    assert named.keys() == {"a", "b/c", "control/a"}
    back = snapshots.public_of(named | {"outer/first/a": array(9, 2)})
    assert back.weights.keys() == {"a", "b/c"}
    assert back.control.keys() == {"a"}
    outer = Outer(
        moments={"first": {"b/c": array(1, 1)}, "second": {"b/c": array(2, 1)}},
        residual={"delta/b/c": array(3, 1)},
    )
    named = snapshots.outer_arrays(outer)
    assert named.keys() == {"outer/first/b/c", "outer/second/b/c", "outer/residual/delta/b/c"}
    back = snapshots.outer_of(named)
    assert back.moments["second"]["b/c"].tolist() == [2]
    assert back.residual["delta/b/c"].tolist() == [3]
    assert snapshots.outer_of({}) == Outer()


def test_a_snapshot_holds_the_bytes_that_the_fingerprint_covers(tmp_path, make):
    plan, parameters = make.plan(local={"control_variate": True}), make.parameters({"z": (3,), "a": (2, 2)})
    arrays = snapshots.complete({"z": array(1, 3), "a": array(2, 2, 2)}, plan, parameters)
    snapshots.save_arrays(arrays, tmp_path / "s")
    data = b"".join(arrays[name].tobytes() for name in sorted(arrays))
    assert (tmp_path / "s").read_bytes().endswith(data)
    found = snapshots.load_arrays(tmp_path / "s", plan, parameters)
    assert snapshots.fingerprint_of(found) == snapshots.fingerprint_of(arrays)
    assert found["control/z"].tolist() == [0, 0, 0]


def test_first_weights_come_without_control_variate(tmp_path, make):
    parameters = make.parameters({"w": (3,)})
    snapshots.save_arrays({"w": array(1, 3)}, tmp_path / "s")
    found = snapshots.load_arrays(tmp_path / "s", make.plan(local={"control_variate": True}), parameters)
    assert found["control/w"].tolist() == [0, 0, 0]
    assert snapshots.load_arrays(tmp_path / "s", make.plan(), parameters).keys() == {"w"}


def test_outer_state_is_not_part_of_the_fingerprint():
    arrays = {"w": array(1, 3)}
    assert snapshots.fingerprint_of(arrays | {"outer/first/w": array(2, 3)}) == snapshots.fingerprint_of(
        arrays
    )
    assert snapshots.fingerprint_of(arrays | {"control/w": array(2, 3)}) != snapshots.fingerprint_of(arrays)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"w": array(1, 3)},
        {"w": array(1, 3), "b": array(1, 1), "x": array(1, 1)},
        {"w": array(1, 3), "b": array(1, 2)},
        {"w": array(1, 3), "b": array(1, 1), "control/w": array(1, 3)},
    ],
    ids=lambda a: ",".join(a) or "empty",
)
def test_a_file_that_is_not_a_snapshot_of_the_plan_is_refused(tmp_path, make, arrays):
    plan, parameters = make.plan(local={"control_variate": True}), make.parameters({"w": (3,), "b": (1,)})
    snapshots.save_arrays(arrays, tmp_path / "s")
    with pytest.raises(UpdateError):
        snapshots.load_arrays(tmp_path / "s", plan, parameters)


def test_fresh_outer_state_is_zeros(make):
    plan = make.plan(outer={"name": "adamw"})
    parameters = make.parameters({"w": (3,)})
    found = snapshots.complete_outer(Outer(moments={"first": {"w": array(1, 3)}}), plan, parameters)
    assert found.keys() == wire.outer_schema(plan, parameters).keys()
    assert found["outer/first/w"].tolist() == [1, 1, 1]
    assert found["outer/second/w"].tolist() == [0, 0, 0]
