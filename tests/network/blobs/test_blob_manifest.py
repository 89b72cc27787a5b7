"""The manifest: one id per content, exact bounds for what strangers send."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manyhands.errors import BlobError
from manyhands.network.blobs import manifest as module
from manyhands.network.blobs.manifest import (
    CHUNK_BYTES,
    Manifest,
    chunk_count,
    manifest_of,
    manifest_of_bytes,
    matching_chunks,
    max_manifest_bytes,
)

bounded = settings(max_examples=80, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Any:
    """Chunks of 8 bytes, so that random data has many; what depends on the real size puts it back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 8)
        yield


def id_by_the_book(data: bytes) -> str:
    chunks = [hashlib.sha256(data[i : i + 8]).digest() for i in range(0, len(data), 8)]
    whole = b"manyhands blob v1" + len(data).to_bytes(8, "little") + len(chunks).to_bytes(8, "little")
    return hashlib.sha256(whole + b"".join(chunks)).hexdigest()


@bounded
@given(st.binary(max_size=100))
@example(b"")
@example(b"12345678")
def test_the_id_is_as_documented(data: bytes) -> None:
    assert manifest_of_bytes(data).blob == id_by_the_book(data)


def test_ids_that_must_never_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)
    empty = hashlib.sha256(b"manyhands blob v1" + bytes(16)).hexdigest()
    assert empty == "83a53d47247c245d9d6d5956bdb88596a7323e0e2848f60c6a6982a61c0f6b93"
    assert manifest_of_bytes(b"").blob == empty
    assert (
        manifest_of_bytes(b"manyhands").blob
        == "ec05d40b772ac22671683d8a1c0ddd2e4a484ecf183fe006e33d3ff2e735e2f3"
    )
    assert (
        manifest_of_bytes(bytes(CHUNK_BYTES + 1)).blob
        == "c8ae10ddaa730e4885211143e20a66ec8eb30f0393c05f468281f813571755ff"
    )


@bounded
@given(st.binary(max_size=100), st.binary(max_size=100))
def test_different_bytes_have_different_ids(one: bytes, other: bytes) -> None:
    assert (manifest_of_bytes(one).blob == manifest_of_bytes(other).blob) == (one == other)


@bounded
@given(st.binary(max_size=100))
def test_json_comes_back(data: bytes) -> None:
    manifest = manifest_of_bytes(data)
    assert Manifest.from_json(manifest.to_json(), max_bytes=len(data)) == manifest
    assert len(manifest.to_json()) <= max_manifest_bytes(len(data))
    assert sum(manifest.length(i) for i in range(len(manifest.chunks))) == len(data)
    assert all(
        manifest.fits(i, [data[manifest.offset(i) :][: manifest.length(i)]])
        for i in range(len(manifest.chunks))
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["size", "chunks", "x"]), inner)
    ),
    max_leaves=8,
)


@bounded
@given(json_values)
def test_whatever_a_stranger_sends_is_a_manifest_or_refused(value: Any) -> None:
    try:
        manifest = Manifest.from_json(json.dumps(value).encode(), max_bytes=64)
    except BlobError:
        return
    assert json.loads(manifest.to_json()) == value
    assert len(manifest.chunks) == chunk_count(manifest.size_bytes)


DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 800, "not JSON"),
        (b'{"size":' + b"9" * 800 + b',"chunks":[]}', "size is|not JSON"),
        (b"[]", "must be an object"),
        (b'{"size":0}', "must be an object"),
        (b'{"size":0,"chunks":[],"more":1}', "must be an object"),
        (b'{"size":-1,"chunks":[]}', "size is -1"),
        (b'{"size":true,"chunks":["' + DIGEST.encode() + b'"]}', "size is True"),
        (b'{"size":1.0,"chunks":["' + DIGEST.encode() + b'"]}', "size is 1.0"),
        (b'{"size":101,"chunks":[]}', "from 0 to 100"),
        (b'{"size":8,"chunks":[]}', "exactly 1 chunks"),
        (b'{"size":8,"chunks":["' + DIGEST.encode() + b'","' + DIGEST.encode() + b'"]}', "exactly 1 chunks"),
        (b'{"size":8,"chunks":{"0":1}}', "exactly 1 chunks"),
        (b'{"size":8,"chunks":["' + DIGEST.upper().encode() + b'"]}', "64 lower-case hex"),
        (b'{"size":8,"chunks":[5]}', "64 lower-case hex"),
        (b" " * 5000, "at most"),
    ],
)
def test_bounds(body: bytes, why: str) -> None:
    with pytest.raises(BlobError, match=why):
        Manifest.from_json(body, max_bytes=100)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
@pytest.mark.parametrize("threads", [1, 3])
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, threads: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK_BYTES)
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert manifest_of(tmp_path / "file", threads) == manifest_of_bytes(data)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BlobError, match="cannot be read as a blob"):
            manifest_of(path)


@bounded
@given(st.binary(min_size=1, max_size=60), st.integers(0, 70), st.integers(0, 59))
def test_what_a_file_has_already(data: bytes, kept: int, spoiled: int) -> None:
    manifest = manifest_of_bytes(data)
    stale = bytearray(data[:kept])
    if spoiled < len(stale):
        stale[spoiled] ^= 1
    file = os.memfd_create("blob")
    try:
        os.write(file, stale)
        expected = {
            i for i in range(len(manifest.chunks)) if stale[8 * i : 8 * i + 8] == data[8 * i : 8 * i + 8]
        }
        assert matching_chunks(file, manifest) == expected
    finally:
        os.close(file)


def test_there_is_no_chunk_past_the_end() -> None:
    manifest = manifest_of_bytes(b"12345678")
    for index in (-1, 1, 2**40):
        with pytest.raises(BlobError, match="there is no chunk"):
            manifest.length(index)
