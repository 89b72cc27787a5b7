"""The store: only right bytes get in, only whole blobs are seen, and a crash anywhere loses no more than it must."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import BlobError, StorageError
from manyhands.network.blobs import store as module
from manyhands.network.blobs.manifest import CHUNK_BYTES, Manifest, manifest_of_bytes
from manyhands.network.blobs.store import BlobStore, CorruptChunk, IncompleteBlob, UnknownBlob


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store", durable=False)


def chunk(data: bytes, index: int) -> bytes:
    return data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


def fill(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    for index in store.begin(manifest):
        store.write_chunk(manifest.blob, index, chunk(data, index))
    assert store.complete(manifest.blob) == manifest.ref


def test_chunks_in_any_order_make_the_blob(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    blob = manifest.blob
    assert store.begin(manifest) == [0, 1, 2, 3]
    for index, missing in ((3, [0, 1, 2]), (0, [1, 2]), (2, [1])):
        store.write_chunk(blob, index, chunk(data, index))
        assert store.missing(blob) == store.begin(manifest) == missing
    assert not store.has(blob)
    with pytest.raises(IncompleteBlob, match=r"misses 1 chunks \(1"):
        store.complete(blob)
    store.write_chunk(blob, 1, chunk(data, 1)[:100], memoryview(chunk(data, 1))[100:])  # in parts
    assert store.complete(blob) == manifest.ref
    assert store.path(blob).read_bytes() == data
    assert store.manifest(blob) == manifest
    assert [store.read_chunk(blob, i) for i in range(4)] == [chunk(data, i) for i in range(4)]
    store.verify(blob)
    assert list(store.blobs()) == [blob]
    # all of it again changes nothing
    assert store.begin(manifest) == store.missing(blob) == []
    store.write_chunk(blob, 1, chunk(data, 1))
    assert store.complete(blob) == manifest.ref
    assert list((store.directory / "partial").iterdir()) == []


def test_an_empty_blob(store: BlobStore) -> None:
    manifest = manifest_of_bytes(b"")
    assert store.begin(manifest) == []
    assert store.complete(manifest.blob).size_bytes == 0
    assert store.path(manifest.blob).read_bytes() == b""


def test_wrong_bytes_are_not_written(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    store.begin(manifest)
    right = chunk(data, 1)
    wrong = [right[:-1] + bytes([right[-1] ^ 1]), right[:-1], right + b"x", b"", chunk(data, 0)]
    for bytes_ in wrong:
        with pytest.raises(CorruptChunk, match="chunk 1 of blob"):
            store.write_chunk(manifest.blob, 1, bytes_)
    with pytest.raises(BlobError, match="there is no chunk 4"):
        store.write_chunk(manifest.blob, 4, right)
    assert store.missing(manifest.blob) == [0, 1, 2, 3]
    assert not any((store.directory / "partial" / manifest.blob / "data").read_bytes())
    fill(store, data, manifest)
    with pytest.raises(CorruptChunk):  # also when the blob is there
        store.write_chunk(manifest.blob, 1, wrong[0])


def test_names_that_are_no_ids_never_reach_the_disk(store: BlobStore) -> None:
    (store.directory / "objects" / "et").mkdir()
    for name in ("../../etc/passwd", "", "A" * 64, "a" * 63, "a" * 64 + "\n", "é" * 64):
        for act in (store.path, store.missing, store.delete, store.complete):
            with pytest.raises(BlobError, match="is not 64 lower-case hex digits"):
                act(name)


def test_what_is_not_there(store: BlobStore) -> None:
    for act in (store.path, store.manifest, store.missing, store.complete, store.verify):
        with pytest.raises(UnknownBlob, match="is not in the store"):
            act("0" * 64)
    assert not store.delete("0" * 64)


def test_files_of_this_machine(store: BlobStore, data: bytes, manifest: Manifest, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    assert store.put_file(path, move=False) == manifest.ref
    assert path.read_bytes() == data
    assert store.put_file(path) == manifest.ref  # there already: the file goes all the same
    assert not path.exists()
    assert store.delete(manifest.blob)
    assert not store.has(manifest.blob)
    path.write_bytes(data)
    assert store.put_file(path) == manifest.ref
    assert not path.exists()
    assert store.path(manifest.blob).read_bytes() == data
    assert list((store.directory / "partial").iterdir()) == []


def test_damage_on_the_disk_is_found_when_asked(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    fill(store, data, manifest)
    path = store.path(manifest.blob)
    with path.open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 9)
        file.write(bytes([data[2 * CHUNK_BYTES + 9] ^ 1]))
    with pytest.raises(BlobError, match=r"damaged on the disk.*wrong chunks: 2"):
        store.verify(manifest.blob)
    os.truncate(path, CHUNK_BYTES)
    with pytest.raises(BlobError, match=f"{CHUNK_BYTES} bytes, {len(data)} expected"):
        store.verify(manifest.blob)
    with pytest.raises(BlobError, match=r"chunk 1 of blob .* cannot be read"):
        store.read_chunk(manifest.blob, 1)


def test_a_damaged_manifest_is_found(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    fill(store, data, manifest)
    path = store.path(manifest.blob)
    path.with_name(path.name + ".manifest").write_bytes(manifest_of_bytes(b"other").to_json())
    with pytest.raises(BlobError, match=r"manifest of blob .* is damaged"):
        BlobStore(store.directory).manifest(manifest.blob)


def test_too_large_and_no_room(tmp_path: Path, data: bytes, manifest: Manifest) -> None:
    with pytest.raises(BlobError, match=f"has {len(data)} bytes: at most 1000 are stored"):
        BlobStore(tmp_path, max_bytes=1000).begin(manifest)
    crowded = BlobStore(tmp_path, reserve_bytes=2**60)
    with pytest.raises(
        StorageError, match=rf"needs {len(data)} bytes .*{2**60} are to stay free: only \d+ are"
    ):
        crowded.begin(manifest)
    assert list((tmp_path / "partial").iterdir()) == []


def test_a_disk_that_fills_up(store: BlobStore, manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(StorageError, match=r"No space left on device.*check disk and space"):
            store.begin(manifest)
    assert store.begin(manifest) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------- crashes
def test_a_restart_finds_what_was_written(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    store.begin(manifest)
    for index in (0, 2, 3):
        store.write_chunk(manifest.blob, index, chunk(data, index))
    with (store.directory / "partial" / manifest.blob / "data").open("r+b") as file:
        file.seek(2 * CHUNK_BYTES + 77)  # a page that never reached the disk
        file.write(bytes(4096))
    again = BlobStore(store.directory, durable=False)
    assert again.sweep() == 0  # young: its upload may go on
    assert again.missing(manifest.blob) == [1, 2]
    fill(again, data, manifest)
    assert again.path(manifest.blob).read_bytes() == data


def test_a_restart_knows_a_blob_by_its_first_chunk(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    """A client whose server was restarted just sends the next chunk."""
    store.begin(manifest)
    again = BlobStore(store.directory, durable=False)
    again.write_chunk(manifest.blob, 1, chunk(data, 1))
    assert again.missing(manifest.blob) == [0, 2, 3]


def test_sweeping(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    fill(store, data, manifest)
    orphan = manifest_of_bytes(b"orphan")
    half = manifest_of_bytes(b"half-written")
    store.begin(half)
    (store.directory / "partial" / "broken").mkdir()
    (store.directory / "partial" / "left-by-put-file").write_bytes(b"x")
    folder = store.directory / "objects" / orphan.blob[:2]
    folder.mkdir(exist_ok=True)
    (folder / f"{orphan.blob}.manifest").write_bytes(orphan.to_json())
    (folder / f"{orphan.blob}.manifest.aside").write_bytes(b"{")
    assert store.sweep() == 2
    assert list(folder.glob(f"{orphan.blob}*")) == []
    assert store.missing(half.blob) == [0]
    assert store.sweep(0) == 1
    with pytest.raises(UnknownBlob):
        store.missing(half.blob)
    store.verify(manifest.blob)


class Crash(BaseException):
    """The machine stops here."""


@pytest.mark.parametrize("how", ["chunks", "put_file"])
def test_a_crash_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, how: str) -> None:
    """Stop before each call that changes the disk, one after the other; what is left is always put right."""
    data = data[-CHUNK_BYTES - 100 :]
    manifest = manifest_of_bytes(data)
    for point in range(1, 100):
        directory, source = tmp_path / str(point), tmp_path / f"{point}.source"
        source.write_bytes(data)
        if not crashes_at(point, monkeypatch, lambda d=directory, s=source: put(d, s, data, manifest, how)):
            break
        store = BlobStore(directory, durable=False)
        store.sweep()
        if store.has(manifest.blob):
            store.verify(manifest.blob)
        else:
            fill(store, data, manifest)
        assert store.path(manifest.blob).read_bytes() == data
        store.sweep(0)
        path = store.path(manifest.blob)
        files = {found for found in directory.rglob("*") if found.is_file()}
        assert files == {path, path.with_name(f"{path.name}.manifest")}
    assert point > (8 if how == "put_file" else 15)


def put(directory: Path, source: Path, data: bytes, manifest: Manifest, how: str) -> None:
    store = BlobStore(directory)
    if how == "put_file":
        store.put_file(source, manifest=manifest)
    else:
        fill(store, data, manifest)


def crashes_at(point: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> bool:
    count = 0

    def stopping(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == point:
                raise Crash
            return honest(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "pwritev", "posix_fallocate", "mkdir", "unlink"):
            patch.setattr(os, name, stopping(getattr(os, name)))
        try:
            act()
        except Crash:
            return True
    return False


def test_durable_means_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, manifest: Manifest
) -> None:
    """Bytes, manifest and both directories are synced before `complete` returns; bytes before they get their name."""
    steps: list[str] = []
    honest_fsync, honest_replace = os.fsync, os.replace

    def fsync(file: int) -> None:
        steps.append("sync " + os.readlink(f"/proc/self/fd/{file}"))
        honest_fsync(file)

    def replace(source: Path, target: Path) -> None:
        steps.append(f"name {target}")
        honest_replace(source, target)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "replace", replace)
    store = BlobStore(tmp_path)
    fill(store, data, manifest)
    path = store.path(manifest.blob)
    order = [
        f"sync {tmp_path}/partial/{manifest.blob}/data",
        f"name {path}",
        f"sync {path.parent}",
        f"sync {path.parent.parent}",
    ]
    assert [step for step in steps if step in order] == order
    manifest_named = steps.index(f"name {path}.manifest")
    assert "manifest." in steps[manifest_named - 1]
    assert manifest_named < steps.index(f"name {path}")


# ------------------------------------------------------------------------------------------- threads
def test_many_writers_of_one_blob(store: BlobStore, data: bytes, manifest: Manifest) -> None:
    faults: list[BaseException] = []
    ends: Counter[int] = Counter()

    def write(order: list[int]) -> None:
        try:
            store.begin(manifest)
            for index in order:
                store.write_chunk(manifest.blob, index, chunk(data, index))
            ends[store.complete(manifest.blob).size_bytes] += 1
        except BaseException as error:  # noqa: BLE001 - whatever a thread met is to be seen by the test
            faults.append(error)

    orders = [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]]
    threads = [threading.Thread(target=write, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert ends == {len(data): 4}
    store.verify(manifest.blob)
