"""What a training made, from the host to here: in checked chunks, continued after a cut, whole or not there.

A checkpoint is one directory: it gets its name when all of its files are here. Other files are written aside and
renamed. After a cut the parts that are here are compared with the host's by their chunks' SHA-256, and only the rest
is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from manyhands.config.checkpoint_names import RUN, TRAINING, numbered
from manyhands.errors import BlobError, ProtocolError, Refused, ServerUnreachable, StorageError
from manyhands.hosts.agent import Agent, agent
from manyhands.hosts.connection import connected
from manyhands.hosts.exports import forget_exports
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.on_host.files import CHUNK
from manyhands.hosts.patience import Patience, patiently
from manyhands.storage.lock import take_lock

GIVEN: Final = ("materials", "inputs", "code")
"""What the host was given, or has made of it: comes only when everything is asked for."""
NEVER: Final = (
    *("plan.yaml", "engine.yaml", "host.json", "events.jsonl", "logs", "lock", "rendezvous.json", "room"),
    *("host.log", "status.json", "status.json.aside", "job.json", "supervisor.py", "supervisor.log"),
)
"""What is never taken from the host: it would change what is kept here of the wish, or is of no use here."""
SILENCE_S: Final = 20.0
WAIT_S: Final = 900.0
"""For another process that fetches the same."""
_CHECKPOINT: Final = re.compile(rf"^checkpoints/((?:{TRAINING}|{RUN})-\d{{8,}})/(.+)$")
_EXPORT: Final = re.compile(rf"^exports/({TRAINING}-\d{{8,}})\.onnx")
_PLAIN: Final = re.compile(r"[^\\:\x00-\x1f]+\Z")
_ALWAYS_BYTES: Final = 4096


@dataclass(slots=True)
class Fetched:
    """What has come. `bytes`: over the connection, hence without what was here."""

    checkpoints: list[str] = field(default_factory=list)
    graphs: list[str] = field(default_factory=list)
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
    StorageError (the disk here is full), BlobError for a name that leads out of the directory, Refused where another
    process fetches into it for a long time.
    """
    result, patience = Fetched(), Patience(host.host_name, tell)

    async def attempt() -> None:
        async with connected(host) as connection, agent(connection, host, docker=docker) as there:
            without = NEVER if everything else (*NEVER, *GIVEN)
            await _bring(there, remote, directory, result, without, patience)
            patience.answered()

    with await _alone(directory, tell):
        begun = time.monotonic()
        await patiently(patience, attempt)
        result.seconds = time.monotonic() - begun
        if keep is not None:
            _prune(directory / "checkpoints", keep)
            forget_exports(directory)
    return result


async def _alone(directory: Path, tell: Callable[[str], None]) -> IO[str]:
    """The right to fetch into `directory`, of one at a time; another is waited for. Raises Refused, StorageError."""
    end, told = time.monotonic() + WAIT_S, False
    while True:
        try:
            return take_lock(directory / ".fetching", "It is waited for.")
        except OSError as error:
            raise StorageError(
                f"{error}; free space here, and fetch again: it goes on where it was"
            ) from error
        except Refused as error:
            if time.monotonic() > end:
                raise Refused(
                    f"{directory} is being fetched to for {WAIT_S / 60:.0f} minutes: {error}"
                ) from None
            if not told:
                tell(str(error))
            told = True
        await asyncio.sleep(0.5)


async def _bring(
    there: Agent, remote: str, directory: Path, result: Fetched, without: Collection[str], patience: Patience
) -> None:
    answer = await there.ask("listing", path=remote, without=list(without))
    if not answer["there"]:
        raise StorageError(f"{remote} is not on the host any more")
    listed = _with_their_checkpoints(_listed(answer["files"], without))
    wanted = [w for name, size in listed if (w := _wanted(directory, name, size)) is not None]
    for one in wanted:
        await _find_offset(there, remote, one)
        result.kept_bytes += one.offset
    gone = await _receive(there, remote, wanted, result, patience)
    for name in dict.fromkeys(m[1] for w in wanted if (m := _CHECKPOINT.match(w.name))):
        if name in gone:  # removed there in favour of a newer one
            shutil.rmtree(_aside(directory, name), ignore_errors=True)
            continue
        _aside(directory, name).rename(directory / "checkpoints" / name)
        result.checkpoints.append(name)


def _aside(directory: Path, checkpoint: str) -> Path:
    return directory / "checkpoints" / f".{checkpoint}.fetched"


def _listed(files: Any, without: Collection[str]) -> list[tuple[str, int]]:
    """Names and sizes as the host says. Raises ProtocolError, BlobError."""
    try:
        listed = [(str(name), int(size)) for name, size in files]
    except (TypeError, ValueError):
        raise ProtocolError("the host's list of files is none") from None
    for name, size in listed:
        _check_name(name, without)
        if size < 0:
            raise ProtocolError(f"the host lists {name!r} with {size} bytes")
    return listed


def _with_their_checkpoints(listed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Without graphs whose checkpoint has gone there: they go as well, and would be removed here."""
    kept = {match[1] for name, _ in listed if (match := _CHECKPOINT.match(name))}
    return [(name, size) for name, size in listed if not (match := _EXPORT.match(name)) or match[1] in kept]


def _check_name(name: str, without: Collection[str]) -> None:
    """What the host was told to leave out is left out here too, whatever it lists. Raises BlobError.

    A name is taken as any system would read it: case, and dots and spaces at the end, make no difference.
    """
    parts = name.split("/")
    if any(not part or part.startswith(".") for part in parts) or not _PLAIN.match(name):
        raise BlobError(
            f"the host lists a file {name!r}, which is not a plain name below the run's directory"
        )
    if parts[0].rstrip(". ").casefold() in without:
        raise BlobError(
            f"the host lists {name!r}, which is not asked for: what is kept here of the run would change"
        )


def _wanted(directory: Path, name: str, size: int) -> _Wanted | None:
    """None for what is here already."""
    checkpoint = _CHECKPOINT.match(name)
    if checkpoint is not None:
        if (directory / "checkpoints" / checkpoint[1]).is_dir():
            return None
        return _Wanted(
            name=name, size=size, aside=_aside(directory, checkpoint[1]) / checkpoint[2], final=None
        )
    final = directory / name
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


async def _receive(
    there: Agent, remote: str, wanted: list[_Wanted], result: Fetched, patience: Patience
) -> set[str]:
    """All files in one stream. The names of checkpoints of which a file has gone meanwhile."""
    gone: set[str] = set()
    told: set[str] = set()
    if not wanted:
        return gone
    writing = _Writing(wanted, result)
    answers = there.stream(
        "read",
        path=remote,
        files=[[w.name, w.offset, w.size] for w in wanted],
        pieces=writing.piece,
        silence_s=SILENCE_S,
    )
    try:
        async for answer in answers:
            fields = answer.fields
            if fields.get("done"):
                continue
            one = writing.one_of(fields)
            if "sha256" in fields:
                writing.chunk(one, fields)
                patience.answered()
                continue
            if "failed" in fields:
                if fields.get("errno") != errno.ENOENT:
                    raise StorageError(f"the host cannot read {one.name}: {fields['failed']}")
                if (checkpoint := _CHECKPOINT.match(one.name)) is not None:
                    gone.add(checkpoint[1])
            else:
                writing.whole(one, fields.get("whole"))
            told.add(one.name)
        if missing := [one.name for one in wanted if one.name not in told]:
            raise ProtocolError(f"the host has sent nothing of {missing[0]}")
        return gone
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

    def one_of(self, fields: dict[str, Any]) -> _Wanted:
        """The file that a frame tells of. Raises ProtocolError."""
        number = fields.get("file")
        if type(number) is not int or not 0 <= number < len(self._wanted):
            raise ProtocolError(f"the host answered with file {number!r} of {len(self._wanted)}")
        return self._wanted[number]

    def piece(self, fields: dict[str, Any], part: memoryview) -> None:
        """Of the chunk that `fields` tell of; at its end they say whether it is `right`.

        Raises ProtocolError for what was not asked for: another place in the file, or more than its size.
        """
        one = self.one_of(fields)
        at = one.offset - self._hashed
        if fields.get("offset") != at or at + fields["size"] > one.size:
            raise ProtocolError(
                f"the host sent {fields['size']} bytes of {one.name} from {fields.get('offset')!r}"
            )
        self._hash.update(part)
        self._hashed += len(part)
        self._result.bytes += len(part)
        file_at = one.offset
        one.offset += len(part)
        if self._hashed == fields["size"]:
            fields["right"] = self._hash.hexdigest() == fields.get("sha256")
            self._hash, self._hashed = hashlib.sha256(), 0
        if self._failed is None:
            try:
                file = self._opened(one, file_at)
                while part:
                    part = part[file.write(part) :]
            except OSError as error:
                self._failed = error

    def chunk(self, one: _Wanted, fields: dict[str, Any]) -> None:
        """It has come. Raises OSError where the disk did not take it."""
        if self._failed is not None:
            raise self._failed
        if not fields.get("right"):
            raise ServerUnreachable(f"{one.name} has changed on the way, at byte {fields['offset']}")

    def whole(self, one: _Wanted, size: Any) -> None:
        """All of it has come; the next file may be open already."""
        if one.size == 0:
            self._opened(one, 0)
        if self._open is one:
            self.close()
        if not size == one.offset == one.size == one.aside.stat().st_size:
            raise ServerUnreachable(
                f"{one.name} has changed meanwhile: {one.size} bytes were listed, {size} came"
            )
        if one.final is not None:
            one.aside.replace(one.final)
            if one.final.suffix == ".onnx":
                self._result.graphs.append(one.name)
        self._result.files += 1

    def _opened(self, one: _Wanted, offset: int) -> IO[bytes]:
        """For writing at `offset`; what was behind it is not trusted."""
        if self._file is None or self._open is not one:
            self.close()
            one.aside.parent.mkdir(parents=True, exist_ok=True)
            one.aside.touch()
            self._file, self._open = one.aside.open("r+b", buffering=0), one
            self._file.truncate(offset)
            self._file.seek(offset)
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._open = None


def _prune(checkpoints: Path, keep: int) -> None:
    """As the host does: the newest stay."""
    for kind in (TRAINING, RUN):
        found = numbered(checkpoints, kind)
        for old in found[: max(0, len(found) - keep)]:
            with contextlib.suppress(OSError):
                shutil.rmtree(old)
