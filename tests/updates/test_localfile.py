"""Local state there and back: every dtype, pending work, and files that are something else."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from manyhands.errors import StorageError
from manyhands.updates import tensorfile
from manyhands.updates.localfile import load_local, save_local
from manyhands.updates.types import Local, Pending


def full_state():
    def like(value):
        return {"w": torch.full((2, 3), value), "layer.b": torch.full((3,), -value)}

    return Local(
        inner={
            "w.exp_avg": torch.randn(2, 3),
            "w.step": torch.tensor(7.0),
            "w.half": torch.randn(4).to(torch.bfloat16),
            "count": torch.tensor([1, 2], dtype=torch.int64),
            "flag": torch.tensor([True, False]),
            "packed": torch.tensor([1, 255], dtype=torch.uint8),
        },
        feedback={"delta": like(0.5), "control": like(1e-40)},
        control=like(3.0),
        pending={
            4: Pending(
                assignment="4-17", feedback={"delta": like(0.25), "control": like(-0.0)}, control=None
            ),
            5: Pending(assignment="5-2", feedback={}, control=like(2.0)),
        },
        after="5-2",
    )


def equal(a, b):
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].view(-1).view(torch.uint8).tolist() == b[n].view(-1).view(torch.uint8).tolist()
        for n in a
    )


@pytest.fixture
def parameters(make):
    return make.parameters({"w": (2, 3), "layer.b": (3,)})


def test_everything_comes_back_to_the_bit(tmp_path, parameters):
    state = full_state()
    save_local(state, tmp_path / "local")
    found = load_local(tmp_path / "local", parameters)
    assert found.after == state.after
    assert equal(found.inner, state.inner)
    assert equal(found.control, state.control)
    assert found.feedback.keys() == state.feedback.keys()
    assert all(equal(found.feedback[c], state.feedback[c]) for c in state.feedback)
    assert found.pending.keys() == state.pending.keys()
    for number, pending in state.pending.items():
        back = found.pending[number]
        assert back.assignment == pending.assignment
        assert equal(back.control, pending.control)
        assert back.feedback.keys() == pending.feedback.keys()
        assert all(equal(back.feedback[c], pending.feedback[c]) for c in pending.feedback)
    found.inner["w.exp_avg"].add_(1)  # writable, and the file does not change
    assert equal(load_local(tmp_path / "local", parameters).inner, state.inner)


@pytest.mark.parametrize("inner", [None, {}])
def test_a_fresh_state_and_one_without_optimizer_state_differ(tmp_path, parameters, inner):
    save_local(Local(inner=inner), tmp_path / "local")
    found = load_local(tmp_path / "local", parameters)
    assert found.inner == inner
    assert found.after == "fresh"
    assert found.control is None


def test_arrays_stay_arrays(tmp_path, parameters):
    control = {"w": np.ones((2, 3), np.float32), "layer.b": np.zeros(3, np.float32)}
    save_local(Local(control=control), tmp_path / "local")
    found = load_local(tmp_path / "local", parameters, arrays=True)
    assert isinstance(found.control["w"], np.ndarray)


def test_a_failed_save_leaves_the_old_state(tmp_path, parameters, monkeypatch):
    save_local(Local(after="1-1"), tmp_path / "local")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match="disk space"):
        save_local(full_state(), tmp_path / "local")
    assert load_local(tmp_path / "local", parameters).after == "1-1"


def test_a_dtype_that_has_no_name_is_an_error(tmp_path):
    with pytest.raises(StorageError, match="complex64"):
        save_local(Local(inner={"x": torch.zeros(2, dtype=torch.complex64)}), tmp_path / "local")


def write(path, header, schema=None):
    with tensorfile.written(path, schema or {"control/w": ("F32", (2, 3))}, header) as out:
        for array in out.values():
            array[...] = 0


GOOD = {"version": 1, "after": "fresh", "inner": False, "control": True, "feedback": [], "pending": {}}
BAD = [
    None,
    {"manyhands.local": "["},
    {"manyhands.local": "[]"},
    {"manyhands.local": json.dumps(GOOD | {"version": 2})},
    {"manyhands.local": json.dumps({k: v for k, v in GOOD.items() if k != "pending"})},
    {
        "manyhands.local": json.dumps(
            GOOD | {"pending": {"x": {"assignment": "", "feedback": [], "control": False}}}
        )
    },
]


@pytest.mark.parametrize("header", BAD)
def test_another_file_is_refused(tmp_path, parameters, header):
    write(tmp_path / "local", header)
    with pytest.raises(StorageError):
        load_local(tmp_path / "local", parameters)


@pytest.mark.parametrize(
    "schema",
    [{"control/w": ("F32", (3, 2))}, {"control/other": ("F32", (2, 3))}, {"control/w": ("F16", (2, 3))}],
)
def test_tensors_of_another_model_are_refused(tmp_path, parameters, schema):
    write(tmp_path / "local", {"manyhands.local": json.dumps(GOOD)}, schema)
    with pytest.raises(StorageError, match="not a client's local state"):
        load_local(tmp_path / "local", parameters)


def test_a_truncated_file_is_refused(tmp_path, parameters):
    save_local(full_state(), tmp_path / "local")
    raw = (tmp_path / "local").read_bytes()
    for length in (0, 7, 100, len(raw) - 1):
        (tmp_path / "local").write_bytes(raw[:length])
        with pytest.raises(StorageError):
            load_local(tmp_path / "local", parameters)
