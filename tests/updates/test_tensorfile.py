"""Mapped safetensors files: readable by the reference library, never half-written, bounded by their schema."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from manyhands.errors import StorageError, UpdateError
from manyhands.updates import tensorfile

SCHEMA = {"b": ("F32", (3,)), "a": ("F32", (2, 2)), "q": ("I8", (5,)), "h": ("BF16", (3,)), "s": ("F32", ())}


def fill(arrays):
    for name, array in arrays.items():
        array[...] = np.arange(array.size).reshape(array.shape) + len(name)


def test_the_reference_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    with tensorfile.written(path, {n: s for n, s in SCHEMA.items() if n != "h"}, {"who": "me"}) as out:
        fill(out)
    found = load_file(path)
    assert found["a"].tolist() == [[1, 2], [3, 4]]
    assert found["q"].dtype == np.int8
    assert found["q"].tolist() == [1, 2, 3, 4, 5]
    assert found["s"].shape == ()
    with safe_open(path, "np") as file:
        assert file.metadata() == {"who": "me"}


def test_bf16_is_its_bits(tmp_path):
    path = tmp_path / "x.safetensors"
    with tensorfile.written(path, {"h": ("BF16", (2,))}) as out:
        out["h"][...] = [0x3F80, 0xC000]
    with safe_open(path, "pt") as file:
        assert file.get_tensor("h").tolist() == [1.0, -2.0]
        assert file.get_tensor("h").dtype == torch.bfloat16


def test_what_the_reference_library_writes_is_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "q": np.ones(3, np.int8)}, path)
    with tensorfile.open_checked(path, {"q": ("I8", (3,)), "w": ("F32", (2, 3))}) as file:
        assert file.arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
        with pytest.raises(ValueError, match="read-only"):
            file.arrays["w"][0, 0] = 1


def test_metadata_is_refused_unless_allowed(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": np.ones(1, np.float32)}, path, metadata={"format": "pt"})
    with pytest.raises(UpdateError, match="metadata"):
        tensorfile.open_checked(path, {"w": ("F32", (1,))})
    tensorfile.open_checked(path, {"w": ("F32", (1,))}, metadata=True).close()


def test_an_interrupted_file_is_never_seen(tmp_path):
    path = tmp_path / "x"
    with tensorfile.written(path, SCHEMA) as out:
        fill(out)
    before = path.read_bytes()

    def fails():
        with tensorfile.written(path, SCHEMA) as out:
            out["a"][...] = 7
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_private_arrays_never_reach_the_file(tmp_path):
    path = tmp_path / "x"
    with tensorfile.written(path, SCHEMA) as out:
        fill(out)
    before = path.read_bytes()
    with tensorfile.open_own(path, SCHEMA, private=True) as file:
        file.arrays["a"][...] = 9
        assert file.arrays["a"].sum() == 36
    assert path.read_bytes() == before


def test_arrays_outlive_the_file_object(tmp_path):
    path = tmp_path / "x"
    with tensorfile.written(path, SCHEMA) as out:
        fill(out)
    with tensorfile.open_own(path) as file:
        held = file.arrays["a"]
    path.unlink()
    assert held.tolist() == [[1, 2], [3, 4]]


def test_create_reuses_a_file_of_any_size(tmp_path):
    path = tmp_path / "x"
    for old in (b"", b"x" * 10, b"x" * 100_000):
        path.write_bytes(old)
        with tensorfile.create(path, SCHEMA) as file:
            fill(file.arrays)
            file.flush()
        with tensorfile.open_own(path, SCHEMA) as file:
            assert file.arrays["b"].tolist() == [1, 2, 3]


def test_a_full_disk_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match="free some disk space"):
        tensorfile.create(tmp_path / "x", SCHEMA)


def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(StorageError, match="missing"):
        tensorfile.open_own(tmp_path / "missing")
    with pytest.raises(UpdateError, match="missing"):
        tensorfile.open_checked(tmp_path / "missing", SCHEMA)
    (tmp_path / "text").write_text("not a tensor file at all")
    with pytest.raises(StorageError, match="text"):
        tensorfile.open_own(tmp_path / "text")
