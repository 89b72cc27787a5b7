"""What a training made, from the host to here: in checked chunks, continued after a cut, whole or not there.

A checkpoint is one directory: it gets its name when all of its files are here. Other files are written aside and
renamed. After a cut the parts that are here are compared with the host's by their chunks' SHA-256, and only the rest
is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

from manyhands.errors import BlobError, ServerUnreachable, StorageError
from manyhands.hosts.agent import Agent, agent
from manyhands.hosts.connection import connected
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.on_host.files import CHUNK
from manyhands.hosts.patience import Patience, patiently

NOT_RESULTS: Final = (
    *(
        "materials",
        "inputs",
        "code",
        "events.jsonl",
        "host.log",
        "status.json",
        "status.json.aside",
        "job.json",
    ),
    *(
        "supervisor.py",
        "supervisor.log",
        "room",
        "lock",
        "plan.yaml",
        "engine.yaml",
        "host.json",
        "rendezvous.json",
    ),
)
SILENCE_S: Final = 20.0
_CHECKPOINT: Final = re.compile(r"^checkpoints/((?:step|round)-\d{8,})/(.+)$")
_ALWAYS_BYTES: Final = 4096


@dataclass(slots=True)
class Fetched:
    """What has come. `bytes`: over the connection, hence without what was here."""

    checkpoints: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Wanted:
    """A file of the host, `name` below the run's directory, and where it is written."""

    name: str
    size: int
    aside: Path
    final: Path | None  # None: its directory is renamed
    offset: int = 0


async def fetch(
    host: Host,
    remote: str,
    directory: Path,
    *,
    docker: bool = False,
    everything: bool = False,
    tell: Callable[[str], None] = lambda _text: None,
    keep: int | None = None,
) -> Fetched:
    """Bring what is new below `remote` to `directory`; goes on by itself after a cut.

    everything: also materials, inputs and code. keep: so many checkpoints stay here. Raises ServerUnreachable,
    StorageError (the disk here is full), BlobError for a name that leads out of the directory.
    """
    result, patience = Fetched(), Patience(host.host_name, tell)

    async def attempt() -> None:
        async with connected(host) as connection, agent(connection, host, docker=docker) as there:
            patience.answered()
            await _bring(there, remote, directory, result, () if everything else NOT_RESULTS)

    begun = time.monotonic()
    await patiently(patience, attempt)
    result.seconds = time.monotonic() - begun
    if keep is not None:
        _prune(directory / "checkpoints", keep)
    return result


async def _bring(there: Agent, remote: str, directory: Path, result: Fetched, without: Iterable[str]) -> None:
    answer = await there.ask("listing", path=remote, without=list(without))
    if not answer["there"]:
        raise StorageError(f"{remote} is not on the host any more")
    listed = [(str(name), int(size)) for name, size in answer["files"]]
    wanted = [w for name, size in listed if (w := _wanted(directory, name, size)) is not None]
    for one in wanted:
        await _find_offset(there, remote, one)
        result.kept_bytes += one.offset
    gone = await _receive(there, remote, wanted, result)
    for name in dict.fromkeys(m[1] for w in wanted if (m := _CHECKPOINT.match(w.name))):
        if name in gone:  # removed there in favour of a newer one
            shutil.rmtree(_aside(directory, name), ignore_errors=True)
            continue
        _aside(directory, name).rename(directory / "checkpoints" / name)
        result.checkpoints.append(name)


def _aside(directory: Path, checkpoint: str) -> Path:
    return directory / "checkpoints" / f".{checkpoint}.fetched"


def _wanted(directory: Path, name: str, size: int) -> _Wanted | None:
    """None for what is here already. Raises BlobError for a name that leads out of the directory."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts:
        raise BlobError(f"the host lists a file {name!r}, which is not below the run's directory")
    checkpoint = _CHECKPOINT.match(name)
    if checkpoint is not None:
        if (directory / "checkpoints" / checkpoint[1]).is_dir():
            return None
        return _Wanted(
            name=name, size=size, aside=_aside(directory, checkpoint[1]) / checkpoint[2], final=None
        )
    final = directory.joinpath(*parts)
    if size > _ALWAYS_BYTES and final.is_file() and final.stat().st_size == size:
        return None
    return _Wanted(name=name, size=size, aside=final.with_name(f".{final.name}.part"), final=final)


async def _find_offset(there: Agent, remote: str, wanted: _Wanted) -> None:
    """Where to go on: behind the last chunk that is here as it is there."""
    here = wanted.aside.stat().st_size if wanted.aside.is_file() else 0
    whole = here if here == wanted.size else here // CHUNK * CHUNK
    if not 0 < here <= wanted.size or not whole:
        return
    answer = await there.ask("hashes", path=f"{remote}/{wanted.name}", bytes=whole)
    with wanted.aside.open("rb") as file:
        for digest in answer["hashes"]:
            body = file.read(CHUNK)
            if hashlib.sha256(body).hexdigest() != digest:
                break
            wanted.offset += len(body)


async def _receive(there: Agent, remote: str, wanted: list[_Wanted], result: Fetched) -> set[str]:
    """All files in one stream. The names of checkpoints of which a file has gone meanwhile."""
    gone: set[str] = set()
    if not wanted:
        return gone
    writing = _Writing(wanted, result)
    answers = there.stream(
        "read", path=remote, files=[[w.name, w.offset] for w in wanted], pieces=writing.piece
    )
    try:
        while True:
            try:
                answer = await asyncio.wait_for(anext(answers), SILENCE_S)
            except TimeoutError:
                raise ServerUnreachable(f"nothing came for {SILENCE_S:.0f} s") from None
            fields = answer.fields
            if fields.get("done"):
                return gone
            one = wanted[fields["file"]]
            if "sha256" in fields:
                writing.chunk(one, fields)
            elif "gone" in fields:
                if (checkpoint := _CHECKPOINT.match(one.name)) is not None:
                    gone.add(checkpoint[1])
            else:
                writing.whole(one, fields["whole"])
    except OSError as error:
        raise StorageError(f"{error}; free space here, and fetch again: it goes on where it was") from error
    finally:
        writing.close()


class _Writing:
    """The file that is being written: pieces as they come, and each chunk's hash at its end.

    What was written of a chunk that turns out wrong is found when the next attempt compares what is here.
    """

    def __init__(self, wanted: list[_Wanted], result: Fetched) -> None:
        self._wanted, self._result = wanted, result
        self._file: IO[bytes] | None = None
        self._open: _Wanted | None = None
        self._hash, self._hashed = hashlib.sha256(), 0
        self._failed: OSError | None = None

    def piece(self, fields: dict[str, Any], part: memoryview) -> None:
        """Of the chunk that `fields` tell of; at its end they say whether it is `right`."""
        self._hash.update(part)
        self._hashed += len(part)
        self._result.bytes += len(part)
        if self._hashed == fields["size"]:
            fields["right"] = self._hash.hexdigest() == fields["sha256"]
            self._hash, self._hashed = hashlib.sha256(), 0
        if self._failed is None:
            try:
                file = self._opened(self._wanted[fields["file"]])
                while part:
                    part = part[file.write(part) :]
            except OSError as error:
                self._failed = error

    def chunk(self, one: _Wanted, fields: dict[str, Any]) -> None:
        """It has come. Raises OSError where the disk did not take it."""
        if self._failed is not None:
            raise self._failed
        if not fields["right"]:
            raise ServerUnreachable(f"{one.name} has changed on the way, at byte {fields['offset']}")

    def whole(self, one: _Wanted, size: int) -> None:
        """All of it has come; the next file may be open already."""
        if self._open is one:
            self.close()
        one.aside.parent.mkdir(parents=True, exist_ok=True)
        with one.aside.open("ab") as file:
            file.truncate(size)
        if one.final is not None:
            one.aside.replace(one.final)
        self._result.files += 1

    def _opened(self, one: _Wanted) -> IO[bytes]:
        if self._file is None or self._open is not one:
            self.close()
            one.aside.parent.mkdir(parents=True, exist_ok=True)
            one.aside.touch()
            self._file, self._open = one.aside.open("r+b", buffering=0), one
            self._file.seek(one.offset)
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._open = None


def _prune(checkpoints: Path, keep: int) -> None:
    """As the host does: the newest stay."""
    names = sorted(p.name for p in checkpoints.glob("*-*") if p.is_dir()) if checkpoints.is_dir() else []
    for old in names[: max(0, len(names) - keep)]:
        with contextlib.suppress(OSError):
            shutil.rmtree(checkpoints / old)
