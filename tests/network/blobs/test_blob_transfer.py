"""Transfers against real servers that die, holders that lie, stall, refuse or cut, and disks that are full."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from manyhands.coordination.types import BlobRef
from manyhands.errors import BlobError, Refused, ServerUnreachable, StorageError
from manyhands.network.blobs import transfer
from manyhands.network.blobs.holders import Effort, Holder
from manyhands.network.blobs.manifest import CHUNK_BYTES, Manifest, manifest_of_bytes
from manyhands.network.blobs.store import BlobStore
from manyhands.network.blobs.transfer import download, upload

FAST = Effort(first_delay_s=0.02, longest_delay_s=0.1, patience_s=10)
HASTY = Effort(first_delay_s=0.01, longest_delay_s=0.02, patience_s=0.15, silence_timeout_s=0.2)


@pytest.fixture
def source(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "source"
    path.write_bytes(data)
    return path


@pytest.fixture
def stored(new_server: Callable[[], Any], data: bytes, tmp_path: Path) -> Any:
    """A server, not started, whose store has `data`."""
    server = new_server()
    path = tmp_path / "to-be-stored"
    path.write_bytes(data)
    BlobStore(server.directory, durable=False).put_file(path)
    return server


def run(act: Callable[[aiohttp.ClientSession], Any]) -> Any:
    async def main() -> Any:
        async with aiohttp.ClientSession() as session:
            return await act(session)

    return asyncio.run(main())


def sent(server: Any, source: Path, **options: Any) -> BlobRef:
    holder = options.pop("holder", None) or Holder(url=server.url)
    ref: BlobRef = run(lambda session: upload(session, holder, source, **{"effort": FAST, **options}))
    return ref


def parts_of(destination: Path) -> list[Path]:
    return list(destination.parent.glob(destination.name + ".*.part"))


# ------------------------------------------------------------------------------------------- both ways
def test_there_and_back(
    new_server: Callable[[], Any], source: Path, data: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    server = new_server().start(token="t")
    holder = Holder(url=server.url + "/", headers={"Authorization": "t"})
    up: list[int] = []
    down: list[int] = []
    assert sent(server, source, holder=holder, progress=up.append) == manifest.ref
    assert sum(up) == len(data)
    again: list[int] = []
    assert sent(server, source, holder=holder, manifest=manifest, progress=again.append) == manifest.ref
    assert sum(again) == len(data)
    destination = tmp_path / "deep" / "destination"
    got = run(
        lambda session: download(
            session, [holder], manifest.ref, destination, effort=FAST, progress=down.append, durable=True
        )
    )
    assert got == manifest
    assert destination.read_bytes() == data
    assert sum(down) == len(data)
    assert parts_of(destination) == []


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES])
def test_sizes_at_the_edges(new_server: Callable[[], Any], tmp_path: Path, size: int) -> None:
    server = new_server().start()
    source, destination = tmp_path / "source", tmp_path / "destination"
    source.write_bytes(bytes(size))
    ref = sent(server, source)
    assert ref == manifest_of_bytes(bytes(size)).ref
    run(lambda session: download(session, [Holder(url=server.url)], ref, destination, effort=FAST))
    assert destination.read_bytes() == bytes(size)


# ------------------------------------------------------------------------------------------- a server that dies
@pytest.mark.chaos
@pytest.mark.parametrize(
    "die_at",
    [
        ["begin", 1, "before"],
        ["begin", 1, "after"],
        ["write_chunk", 1, "before"],
        ["write_chunk", 2, "after"],
        ["write_chunk", 4, "after"],
        ["complete", 1, "before"],
        ["complete", 1, "after"],
    ],
)
def test_an_upload_outlives_its_server(
    new_server: Callable[[], Any], source: Path, manifest: Manifest, die_at: list[Any]
) -> None:
    """kill -9 at each step before the answer leaves; started again, the upload goes on where it was."""
    server = new_server().start(die_at=die_at)

    async def act(session: aiohttp.ClientSession) -> BlobRef:
        sending = asyncio.create_task(upload(session, Holder(url=server.url), source, effort=FAST))
        await server.died()
        await asyncio.to_thread(server.start)
        return await sending

    assert run(act) == manifest.ref
    BlobStore(server.directory).verify(manifest.blob)


@pytest.mark.chaos
def test_verified_chunks_are_not_sent_again(
    new_server: Callable[[], Any], source: Path, data: bytes, manifest: Manifest
) -> None:
    """After a crash of both sides only what is missing travels: the wrong bytes in place of the rest are not read."""
    server = new_server().start(die_at=["write_chunk", 3, "after"])
    with pytest.raises(ServerUnreachable):
        sent(server, source, effort=Effort(in_flight=1, patience_s=0.1, first_delay_s=0.01))
    server.kill()
    server.start()
    changed = bytearray(data)
    changed[: 3 * CHUNK_BYTES] = bytes(3 * CHUNK_BYTES)
    source.write_bytes(changed)
    assert sent(server, source, manifest=manifest) == manifest.ref
    BlobStore(server.directory).verify(manifest.blob)


def test_a_server_that_forgets_is_told_again(
    new_server: Callable[[], Any], source: Path, manifest: Manifest
) -> None:
    """What was begun is swept away between two chunks: the server answers 404, and the manifest is sent anew."""
    server = new_server().start(die_at=["write_chunk", 1, "after"])

    async def act(session: aiohttp.ClientSession) -> BlobRef:
        sending = asyncio.create_task(upload(session, Holder(url=server.url), source, effort=FAST))
        await server.died()
        assert BlobStore(server.directory).sweep(0) == 1
        await asyncio.to_thread(server.start)
        return await sending

    assert run(act) == manifest.ref


# ------------------------------------------------------------------------------------------- refusals
def test_a_server_that_is_not_there(new_server: Callable[[], Any], source: Path, tmp_path: Path) -> None:
    server = new_server().start()
    server.kill()
    with pytest.raises(
        ServerUnreachable, match=r"upload of blob .* no success for 0.15 s.*Is the server running"
    ):
        sent(server, source, effort=HASTY)
    ref, destination = BlobRef(blob="0" * 64, size_bytes=5), tmp_path / "x"
    with pytest.raises(ServerUnreachable, match="Is the server running and reachable"):
        run(lambda session: download(session, [Holder(url=server.url)], ref, destination, effort=HASTY))


def test_refusals_are_final_and_in_the_servers_words(
    new_server: Callable[[], Any], source: Path, manifest: Manifest, tmp_path: Path
) -> None:
    server = new_server().start(token="t", store={"max_bytes": CHUNK_BYTES})
    begun = time.monotonic()
    with pytest.raises(Refused, match=r"answered 401 unauthorized: sign in first to write"):
        sent(server, source)
    with pytest.raises(Refused, match="sign in first to read"):
        run(
            lambda session: download(
                session, [Holder(url=server.url)], manifest.ref, tmp_path / "x", effort=FAST
            )
        )
    known = Holder(url=server.url, headers={"Authorization": "t"})
    with pytest.raises(BlobError, match=f"at most {CHUNK_BYTES}|from 0 to {CHUNK_BYTES}"):
        sent(server, source, holder=known)
    with pytest.raises(BlobError, match=r"is not to be had: .*answered 404 unknown"):
        run(lambda session: download(session, [known], manifest.ref, tmp_path / "x", effort=FAST))
    with pytest.raises(BlobError, match="is not an HTTP address"):
        sent(server, source, holder=Holder(url="iroh://x"))
    assert time.monotonic() - begun < FAST.patience_s


def test_a_file_that_changed_under_the_upload(
    new_server: Callable[[], Any], source: Path, manifest: Manifest
) -> None:
    server = new_server().start()
    with source.open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(BlobError, match=r"answered 422 corrupt"):
        sent(server, source, manifest=manifest)
    with source.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(BlobError, match="changed or cannot be read while it is sent"):
        sent(server, source, manifest=manifest)


def test_too_large_is_refused_before_anything_is_asked(tmp_path: Path, manifest: Manifest) -> None:
    nobody = Holder(url="http://127.0.0.1:1")
    with pytest.raises(BlobError, match="at most 1000 are accepted here"):
        run(lambda session: download(session, [nobody], manifest.ref, tmp_path / "x", max_bytes=1000))
    with pytest.raises(BlobError, match="no holder is known"):
        run(lambda session: download(session, [], manifest.ref, tmp_path / "x"))


def test_no_room_on_this_disk(
    stored: Any, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored.start()
    monkeypatch.setattr(transfer, "_RESERVE_BYTES", 2**60)
    with pytest.raises(StorageError, match=r"only \d+ are. Free some space"):
        run(
            lambda session: download(
                session, [Holder(url=stored.url)], manifest.ref, tmp_path / "x", effort=FAST
            )
        )
    assert parts_of(tmp_path / "x") == []


# ------------------------------------------------------------------------------------------- holders of all kinds
async def honest(_request: web.Request, _index: int, data: bytes) -> web.StreamResponse:
    return web.Response(body=data)


async def lying(_request: web.Request, _index: int, data: bytes) -> web.StreamResponse:
    return web.Response(body=data[:-1] + bytes([data[-1] ^ 1]))


async def short(_request: web.Request, _index: int, data: bytes) -> web.StreamResponse:
    return web.Response(body=data[:-1])


async def endless(request: web.Request, _index: int, data: bytes) -> web.StreamResponse:
    answer = web.StreamResponse()
    await answer.prepare(request)
    while True:
        await answer.write(data or b"x")


async def cutting(request: web.Request, _index: int, data: bytes) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"Content-Length": str(len(data))})
    await answer.prepare(request)
    await answer.write(data[: len(data) // 2])
    assert request.transport is not None
    request.transport.abort()
    return answer


async def stalling(_request: web.Request, _index: int, _data: bytes) -> web.StreamResponse:
    await asyncio.sleep(60)
    return web.Response()


async def away(request: web.Request, _index: int, _data: bytes) -> web.StreamResponse:
    raise web.HTTPFound(str(request.url))


async def broken(_request: web.Request, _index: int, _data: bytes) -> web.StreamResponse:
    return web.Response(status=500, body=b"[" * 5000)


@pytest.mark.parametrize("bad", [lying, short, endless, cutting, stalling, away, broken])
def test_one_bad_holder_among_honest_ones(
    stored: Any,
    fake_holder: Any,
    data: bytes,
    manifest: Manifest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: Any,
) -> None:
    stored.start()
    monkeypatch.setattr(transfer, "_TAKE_OVER_S", 0.2)
    begun = time.monotonic()

    async def act(session: aiohttp.ClientSession) -> None:
        async with fake_holder(bad) as fake:
            effort = Effort(first_delay_s=0.02, patience_s=20, silence_timeout_s=20, in_flight=2)
            await download(
                session, [fake, Holder(url=stored.url)], manifest.ref, tmp_path / "destination", effort=effort
            )

    run(act)
    assert (tmp_path / "destination").read_bytes() == data
    assert time.monotonic() - begun < 10  # a stalling holder is overtaken, not waited for


@pytest.mark.parametrize(
    ("bad", "error", "why"),
    [
        (lying, BlobError, "sent wrong bytes as chunk"),
        (short, BlobError, "sent wrong bytes as chunk"),
        (endless, BlobError, "sent more than the"),
        (away, BlobError, "answered 302"),
        (cutting, ServerUnreachable, "ClientPayloadError"),
        (stalling, ServerUnreachable, "Timeout"),
        (broken, ServerUnreachable, "answered 500"),
    ],
)
def test_only_bad_holders(
    fake_holder: Any, manifest: Manifest, tmp_path: Path, bad: Any, error: type[Exception], why: str
) -> None:
    async def act(session: aiohttp.ClientSession) -> None:
        async with fake_holder(bad) as one, fake_holder(bad) as other:
            with pytest.raises(error, match=why):
                await download(session, [one, other], manifest.ref, tmp_path / "destination", effort=HASTY)

    run(act)
    assert not (tmp_path / "destination").exists()


def test_a_manifest_is_not_believed(
    stored: Any, fake_holder: Any, data: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    stored.start()
    foreign = manifest_of_bytes(data[:-1])
    for body, why in (
        (foreign.to_json(), "manifest of another blob"),
        (Manifest(len(data), (b"x" * 32,) * 4).to_json(), "manifest of another blob"),
        (b"{" * 500, "not JSON"),
        (b" " * 100_000, "sent more than"),
    ):

        async def act(session: aiohttp.ClientSession, body: bytes = body, why: str = why) -> None:
            async with fake_holder(honest, body) as fake:
                with pytest.raises(BlobError, match=why):
                    await download(session, [fake], manifest.ref, tmp_path / "no", effort=HASTY)
                holders = [fake, Holder(url=stored.url)]
                await download(session, holders, manifest.ref, tmp_path / "yes", effort=FAST)

        run(act)
        assert (tmp_path / "yes").read_bytes() == data
        (tmp_path / "yes").unlink()
    assert parts_of(tmp_path / "no") == []


def test_several_holders_share_the_work(
    fake_holder: Any, data: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    asked: Counter[tuple[str, int]] = Counter()

    def counting(name: str) -> Any:
        async def answer(_request: web.Request, index: int, part: bytes) -> web.StreamResponse:
            asked[name, index] += 1
            await asyncio.sleep(0.05)
            return web.Response(body=part)

        return answer

    async def act(session: aiohttp.ClientSession) -> None:
        async with fake_holder(counting("a")) as a, fake_holder(counting("b")) as b:
            effort = Effort(in_flight=1)
            await download(session, [a, b], manifest.ref, tmp_path / "destination", effort=effort)

    run(act)
    assert (tmp_path / "destination").read_bytes() == data
    assert sorted(index for _, index in asked.elements()) == [0, 1, 2, 3]  # each chunk once
    assert {name for name, _ in asked} == {"a", "b"}


def test_a_download_goes_on_where_it_was(
    fake_holder: Any, data: bytes, manifest: Manifest, tmp_path: Path
) -> None:
    """Cut, given up, a page spoiled meanwhile, called again: only what is not there and right is fetched."""
    asked: list[int] = []
    failing = True

    async def answer(request: web.Request, index: int, part: bytes) -> web.StreamResponse:
        asked.append(index)
        return await (cutting if failing and index == 3 else honest)(request, index, part)

    destination = tmp_path / "destination"

    async def act(session: aiohttp.ClientSession) -> None:
        nonlocal failing
        async with fake_holder(answer) as holder:
            with pytest.raises(ServerUnreachable):
                await download(session, [holder], manifest.ref, destination, effort=HASTY)
            assert set(asked) == {0, 1, 2, 3}
            assert not destination.exists()
            asked.clear()
            failing = False
            (part,) = parts_of(destination)
            with part.open("r+b") as file:
                file.seek(CHUNK_BYTES + 5)
                file.write(b"spoiled")
            seen: list[int] = []
            await download(session, [holder], manifest.ref, destination, effort=FAST, progress=seen.append)
            assert sum(seen) == len(data)

    run(act)
    assert sorted(asked) == [1, 3]
    assert destination.read_bytes() == data


@pytest.mark.chaos
def test_a_download_outlives_its_server(stored: Any, data: bytes, manifest: Manifest, tmp_path: Path) -> None:
    stored.start(die_at=["read_chunk", 2, "before"])
    destination = tmp_path / "destination"

    async def act(session: aiohttp.ClientSession) -> None:
        effort = Effort(in_flight=1, first_delay_s=0.02, longest_delay_s=0.1)
        holders = [Holder(url=stored.url)]
        getting = asyncio.create_task(download(session, holders, manifest.ref, destination, effort=effort))
        await stored.died()
        await asyncio.to_thread(stored.start)
        await getting

    run(act)
    assert destination.read_bytes() == data


def test_a_cancelled_download_leaves_no_destination(
    fake_holder: Any, manifest: Manifest, tmp_path: Path
) -> None:
    destination = tmp_path / "destination"

    async def act(session: aiohttp.ClientSession) -> None:
        async with fake_holder(stalling) as holder:
            getting = asyncio.create_task(download(session, [holder], manifest.ref, destination, effort=FAST))
            await asyncio.sleep(0.3)
            getting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await getting
            others = asyncio.all_tasks() - {asyncio.current_task()}
            assert not [task for task in others if "_fetch_from" in repr(task)]

    run(act)
    assert not destination.exists()
    assert len(parts_of(destination)) == 1


def test_headers_are_looked_up_at_each_request(
    new_server: Callable[[], Any], source: Path, manifest: Manifest
) -> None:
    """A token that is renewed while an upload waits for its server is used from then on."""
    server = new_server().start(token="old", die_at=["write_chunk", 1, "after"])
    headers = {"Authorization": "old"}

    async def act(session: aiohttp.ClientSession) -> BlobRef:
        holder = Holder(url=server.url, headers=headers)
        sending = asyncio.create_task(upload(session, holder, source, effort=FAST))
        await server.died()
        headers["Authorization"] = "new"
        await asyncio.to_thread(lambda: server.start(token="new"))
        return await sending

    assert run(act) == manifest.ref
