"""What comes back from a real host: whole or not there, continued after a cut, and checked."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import BlobError, ProtocolError, ServerUnreachable, StorageError
from manyhands.hosts.agent import reached
from manyhands.hosts.fetch import GIVEN, NEVER, Fetched, _listed, _prune, _receive, _Wanted, _Writing, fetch
from manyhands.hosts.hosts_file import host_named
from manyhands.hosts.launch import send_file
from manyhands.hosts.on_host.files import CHUNK
from manyhands.hosts.patience import Patience
from manyhands.ui.bench.loopback_host import LoopbackHost

BIG = 12 * CHUNK + 12_345


@pytest.fixture
def remote(host: LoopbackHost, tmp_path: Path) -> Iterator[Path]:
    """A run on the host with two checkpoints and what else lies there."""
    run = host.home / "runs" / tmp_path.name
    for step in (10, 20):
        state = run / "checkpoints" / f"step-{step:08}" / "state"
        state.mkdir(parents=True)
        (state / "state.safetensors").write_bytes(os.urandom(BIG if step == 20 else 1000))
        (state.parent / "training.json").write_text(f'{{"step": {step}}}')
    (run / "checkpoints" / "latest").write_text("step-00000020\n")
    (run / "checkpoints" / ".step-00000030.partial-1").mkdir()
    (run / "checkpoints" / ".step-00000030.partial-1" / "half").write_text("half")
    (run / "exports").mkdir()
    (run / "exports" / "step-00000020.onnx").write_bytes(os.urandom(100_000))
    (run / "exports" / "step-00000001.onnx").write_bytes(b"of a checkpoint that is not kept any more")
    for name in ("materials/tokens", "inputs/text.txt", "events.jsonl", "status.json", "supervisor.py"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(name)
    yield run
    shutil.rmtree(run)


def brought(remote: Path, here: Path, **settings: object) -> Fetched:
    return asyncio.run(
        asyncio.wait_for(fetch(host_named("server1"), str(remote), here, **settings), 60)  # type: ignore[arg-type]
    )


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()
    }


def results(directory: Path) -> dict[str, bytes]:
    return {name: content for name, content in files(directory).items() if name in RESULTS}


RESULTS = {
    "checkpoints/latest", "exports/step-00000020.onnx",
    *(f"checkpoints/step-000000{n}/{f}" for n in (10, 20) for f in ("training.json", "state/state.safetensors")),
}  # fmt: skip


def test_results_come_and_nothing_else_and_once(remote: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    fetched = brought(remote, here)
    assert set(files(here)) == {*RESULTS, ".fetching/lock"}
    assert results(here) == results(remote)
    assert fetched.checkpoints == ["step-00000010", "step-00000020"]
    assert fetched.graphs == ["exports/step-00000020.onnx"]
    assert brought(remote, here).bytes < 1000  # the small ones, in case they have changed
    brought(remote, here, everything=True)
    assert (here / "materials" / "tokens").read_text() == "materials/tokens"


def test_older_checkpoints_go_as_they_do_there(remote: Path, tmp_path: Path) -> None:
    brought(remote, tmp_path / "here", keep=1)
    assert [p.name for p in (tmp_path / "here" / "checkpoints").glob("step-*")] == ["step-00000020"]


def test_the_newest_is_the_one_with_the_highest_number(tmp_path: Path) -> None:
    for name in ("step-99999999", "step-100000000", "round-00000001", ".step-100000001.fetched"):
        (tmp_path / name).mkdir()
    _prune(tmp_path, 1)
    assert {p.name for p in tmp_path.iterdir()} == {
        "step-100000000",
        "round-00000001",
        ".step-100000001.fetched",
    }


def test_two_at_once_bring_it_once(remote: Path, tmp_path: Path) -> None:
    here, told = tmp_path / "here", list[str]()

    async def both() -> list[Fetched]:
        bring = [fetch(host_named("server1"), str(remote), here, tell=told.append) for _ in range(2)]
        return await asyncio.wait_for(asyncio.gather(*bring), 60)

    first, second = asyncio.run(both())
    assert [*first.checkpoints, *second.checkpoints] == ["step-00000010", "step-00000020"]
    assert len(told) == 1
    assert "is in use by process" in told[0]
    assert results(here) == results(remote)


def test_what_cannot_be_read_there_is_not_taken_for_removed(remote: Path, tmp_path: Path) -> None:
    async def receive(name: str) -> set[str]:
        one = _Wanted(name=name, size=9, aside=tmp_path / "aside", final=None)
        async with reached(host_named("server1")) as there:
            return await _receive(there, str(remote), [one], Fetched(), Patience("server1", print))

    assert asyncio.run(receive("checkpoints/step-00000009/state")) == {"step-00000009"}
    with pytest.raises(StorageError, match="cannot read checkpoints/step-00000010/state"):
        asyncio.run(receive("checkpoints/step-00000010/state"))  # it is a directory


def test_a_cut_transfer_goes_on_where_it_was(remote: Path, tmp_path: Path, host: LoopbackHost) -> None:
    here, told = tmp_path / "here", list[str]()
    aside = here / "checkpoints" / ".step-00000020.fetched" / "state" / "state.safetensors"

    async def cut_in_the_middle() -> Fetched:
        bringing = asyncio.create_task(fetch(host_named("server1"), str(remote), here, tell=told.append))
        while not (aside.is_file() and aside.stat().st_size >= 2 * CHUNK):
            assert not bringing.done(), "it was over before it could be cut"
            await asyncio.sleep(0.002)
        host.cut()
        return await asyncio.wait_for(bringing, 60)

    fetched = asyncio.run(cut_in_the_middle())
    assert results(here) == results(remote)
    assert "trying again" in told[0]
    assert fetched.kept_bytes >= 2 * CHUNK
    assert fetched.bytes < BIG + 2 * CHUNK + 200_000  # what was under way at the cut came twice, nothing else


@pytest.mark.parametrize("damage", ["cut short", "changed", "too long"])
def test_what_is_here_is_compared_before_it_goes_on(remote: Path, tmp_path: Path, damage: str) -> None:
    here = tmp_path / "here"
    aside = here / "checkpoints" / ".step-00000020.fetched" / "state" / "state.safetensors"
    aside.parent.mkdir(parents=True)
    whole = (remote / "checkpoints" / "step-00000020" / "state" / "state.safetensors").read_bytes()
    if damage == "cut short":
        aside.write_bytes(whole[: 5 * CHUNK + 77])
    elif damage == "changed":
        aside.write_bytes(whole[: 3 * CHUNK] + b"x" + whole[3 * CHUNK + 1 : 6 * CHUNK])
    else:
        aside.write_bytes(whole + b"more")
    fetched = brought(remote, here)
    assert fetched.kept_bytes == {"cut short": 5 * CHUNK, "changed": 3 * CHUNK, "too long": 0}[damage]
    assert results(here) == results(remote)


def test_a_checkpoint_that_is_not_whole_is_never_seen(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"

    async def leave_in_the_middle() -> None:
        bringing = asyncio.create_task(fetch(host_named("server1"), str(remote), here))

        def leave(writing: _Writing, one: _Wanted, fields: dict[str, Any]) -> None:
            chunk(writing, one, fields)
            if fields["offset"] == CHUNK:
                bringing.cancel()

        chunk = _Writing.chunk
        monkeypatch.setattr(_Writing, "chunk", leave)
        await asyncio.gather(bringing, return_exceptions=True)

    asyncio.run(leave_in_the_middle())
    assert (here / "checkpoints" / ".step-00000020.fetched" / "state" / "state.safetensors").is_file()
    assert not (here / "checkpoints" / "step-00000020").exists()


def test_a_full_disk_here(remote: Path, tmp_path: Path, tmpfs: Callable[[Path], Path]) -> None:
    small = tmpfs(tmp_path / "small")
    with pytest.raises(StorageError, match="free space here, and fetch again: it goes on where it was"):
        brought(remote, small)


def test_a_host_that_lets_in_and_sends_nothing_is_given_up(
    remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_arguments: object) -> set[str]:
        raise ServerUnreachable("nothing came")

    monkeypatch.setattr("manyhands.hosts.fetch._receive", nothing)
    monkeypatch.setattr("manyhands.hosts.fetch.Patience", functools.partial(Patience, give_up_s=0.5))
    with pytest.raises(ServerUnreachable, match="has not answered for"):
        brought(remote, tmp_path / "here")


def test_a_run_that_is_not_there_any_more(host: LoopbackHost, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is not on the host any more"):
        brought(host.home / "nothing", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "checkpoints/../../x",
        "..\\..\\x",
        "C:x",
        "a/.ssh/x",
        "./plan.yaml",
        "a\n",
        "",
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(BlobError, match="not a plain name below the run's directory"):
        _listed([[name, 1]], ())


@pytest.mark.parametrize(
    "name", ["plan.yaml", "Host.json", "events.jsonl. ", "logs/server1.log", "inputs/text.txt"]
)
def test_what_is_kept_here_of_the_wish_is_not_taken_from_the_host(name: str) -> None:
    with pytest.raises(BlobError, match="not asked for"):
        _listed([[name, 1]], (*NEVER, *GIVEN))


def test_everything_is_without_the_plan_of_the_host(remote: Path, tmp_path: Path) -> None:
    (remote / "plan.yaml").write_text("task: {file: /home/me/.ssh/id_ed25519}")
    brought(remote, tmp_path / "here", everything=True)
    assert (tmp_path / "here" / "inputs").is_dir()
    assert not (tmp_path / "here" / "plan.yaml").exists()


@pytest.mark.parametrize("files", [[["x", -1]], [["x"]], [["x", "much"]], 7])
def test_a_list_that_is_none_is_refused(files: object) -> None:
    with pytest.raises(ProtocolError):
        _listed(files, ())


@pytest.mark.parametrize("wrong", [{"file": 1}, {"file": -1}, {"file": "x"}, {"offset": 4}, {"size": 11}])
def test_bytes_that_were_not_asked_for_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    one = _Wanted(name="x", size=10, aside=tmp_path / "aside", final=tmp_path / "x")
    with pytest.raises(ProtocolError):
        _Writing([one], Fetched()).piece({"file": 0, "offset": 0, "size": 10} | wrong, memoryview(b"12345"))
    assert not one.aside.exists()


def test_a_file_that_is_not_as_long_as_it_was_listed_does_not_get_its_name(tmp_path: Path) -> None:
    one = _Wanted(name="x", size=10, aside=tmp_path / "aside", final=tmp_path / "x")
    writing = _Writing([one], Fetched())
    writing.piece({"file": 0, "offset": 0, "size": 5}, memoryview(b"12345"))
    with pytest.raises(ServerUnreachable, match="has changed meanwhile"):
        writing.whole(one, 10)
    assert not (tmp_path / "x").exists()


def test_a_large_file_to_the_host_goes_on_as_well(host: LoopbackHost, tmp_path: Path) -> None:
    content = os.urandom(3 * CHUNK + 5)
    (tmp_path / "shard").write_bytes(content)
    place = host.home / "shards" / tmp_path.name
    place.parent.mkdir(exist_ok=True)
    place.with_name(f"{place.name}.part").write_bytes(content[: 2 * CHUNK + 9])

    async def send() -> int:
        async with reached(host_named("server1")) as there:
            return await send_file(there, tmp_path / "shard", str(place))

    assert asyncio.run(send()) == CHUNK + 5
    assert place.read_bytes() == content
    assert asyncio.run(send()) == 0
    begun = time.monotonic()
    (tmp_path / "shard").write_bytes(b"")
    assert asyncio.run(send()) == 0
    assert place.read_bytes() == b""
    assert time.monotonic() - begun < 10
