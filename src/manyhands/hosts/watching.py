"""A training on one host or several, watched until its end, and what it made brought here.

It can be left at any time, and taken up again from another terminal. When one of several hosts fails, the others are
asked to save and end, and are ended after a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from manyhands.errors import Interrupted, ManyhandsError, ServerUnreachable, StorageError, WorkerError
from manyhands.hosts.agent import reached
from manyhands.hosts.fetch import Fetched, fetch
from manyhands.hosts.follow import EVENTS, Copy, Follower
from manyhands.hosts.hosts_file import Host, host_named
from manyhands.hosts.record import Part, Record

GRACE_S: Final = 30.0
"""How long the other hosts of a training have to save when one has failed."""
QUIET_S: Final = 180.0
"""After so long without a word a training may hang. Long steps are quiet too, so it is only told."""
_LOOK_AGAIN_S: Final = 2.0


class View(Protocol):
    """Who is told."""

    def event(self, event: dict[str, Any]) -> None: ...
    def line(self, host: str, text: str) -> None: ...
    def tell(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a training ended. exit_code: that of the host that failed first, else of the one that leads."""

    exit_code: int
    endings: dict[str, dict[str, Any]]
    fetched: Fetched


@dataclass(slots=True)
class _Watch:
    """A training that is being watched."""

    directory: Path
    record: Record
    view: View
    saved: asyncio.Event = field(default_factory=asyncio.Event)
    newest: str | None = None
    exporting: set[str] = field(default_factory=set)  # hosts that make their last graphs, or have
    exports: int = 0
    failed_first: str | None = None
    fetched: Fetched = field(default_factory=Fetched)
    heard: float = field(default_factory=time.monotonic)

    def host(self, part: Part) -> Host:
        return host_named(part.host)

    def follower(self, part: Part, *, replay: bool) -> Follower:
        leads = part.rank == 0
        own = None if self.record.shared else self.directory
        follower = Follower(
            self.host(part),
            part.directory,
            docker=part.docker,
            events=Copy(None if own is None else own / EVENTS) if leads else None,
            log=Copy(self.directory / "logs" / f"{part.host}.log"),
            on_event=self._event,
            on_line=lambda text: self._line(part, text),
            on_status=lambda status: self._status(part, status),
            tell=self.view.tell,
        )
        follower.go_on_from_here(replay=replay)
        return follower

    def _status(self, part: Part, status: dict[str, Any]) -> None:
        if status.get("phase") == "exporting" and part.host not in self.exporting:
            self.exporting.add(part.host)
            self.view.tell(f"{part.host} makes ONNX graphs of the checkpoints")
        if status.get("exports", 0) > self.exports:
            self.exports = status["exports"]
            self.saved.set()

    def _line(self, part: Part, text: str) -> None:
        """While it trains, its lines say what its events do; they are in the log, and shown if it ends badly."""
        self.heard = time.monotonic()
        if part.host in self.exporting:
            self.view.line(part.host, text)

    def _event(self, event: dict[str, Any]) -> None:
        self.heard = time.monotonic()
        if event["kind"] == "saved":
            self.newest = Path(str(event["checkpoint"])).name
            self.saved.set()
        self.view.event(event)

    async def tell_silence(self) -> None:
        """Once for each, until cancelled."""
        told: float | None = None
        while True:
            await asyncio.sleep(QUIET_S / 10)
            quiet_s = time.monotonic() - self.heard
            if quiet_s >= QUIET_S and told != self.heard:
                told = self.heard
                self.view.tell(
                    f"nothing has come from {self.record.parts[0].host} for {quiet_s:.0f} s: something long, or it "
                    f"hangs; what it printed: manyhands hosts logs {self.record.run}; end it: manyhands hosts stop "
                    f"{self.record.run} --now"
                )

    async def bring_checkpoints(self) -> None:
        """Each one as soon as it is whole there, until cancelled."""
        if self.record.shared:
            return
        said = ""
        while True:
            await self.saved.wait()
            self.saved.clear()
            wanted = self.newest
            try:
                await self.bring()
            except ManyhandsError as error:
                if said != str(error):
                    self.view.tell(f"not fetched yet: {error}")
                said = str(error)
            if wanted is not None and not (self.directory / "checkpoints" / wanted).is_dir():
                await asyncio.sleep(_LOOK_AGAIN_S)  # it is being written, there
                self.saved.set()

    async def bring(self) -> None:
        """What is new, and tell of it."""
        part = self.record.parts[0]
        fetched = await fetch(
            self.host(part),
            part.directory,
            self.directory,
            docker=part.docker,
            tell=self.view.tell,
            keep=self.record.keep,
        )
        for name in (*(f"checkpoints/{name}" for name in fetched.checkpoints), *fetched.graphs):
            self.view.tell(f"fetched {self.directory / name}")
        self.fetched.bytes += fetched.bytes
        self.fetched.seconds += fetched.seconds

    async def bring_the_rest(self, endings: dict[str, dict[str, Any]]) -> bool:
        """Whether all that was made is here.

        How a training failed is told whatever comes of its files; one that ended well has not if they do not come.
        """
        lead = self.record.parts[0].host
        if self.record.shared:
            return True
        if endings[lead]["state"] == "gone":
            return False
        try:
            await self.bring()
        except ManyhandsError as error:
            if all(exit_code_of(ending) == 0 for ending in endings.values()):
                raise
            self.view.tell(f"not fetched: {error}; try again with `manyhands hosts fetch {self.record.run}`")
            return False
        missing = self.newest is not None and not (self.directory / "checkpoints" / self.newest).is_dir()
        if missing:
            self.view.tell(
                f"{lead} has told of checkpoint {self.newest}, and it has not come: it is not there"
            )
        return not missing

    def keep(self, record: Record) -> None:
        """A disk that is full here does not hide how the training ended."""
        try:
            record.keep_in(self.directory)
        except StorageError as error:
            self.view.tell(str(error))


async def watch(directory: Path, record: Record, view: View, *, replay: bool) -> Outcome:
    """Until the training has ended on all hosts, and what it made is here. Leave it by cancelling.

    replay: the view is told the events that came before as well. One that ended badly has its Outcome also where
    what it made cannot come.

    Raises ServerUnreachable after a long time without a host, StorageError for a full disk here.
    """
    watched = _Watch(directory, record, view)
    followers = {part.host: watched.follower(part, replay=replay) for part in record.parts}
    if record.fetched and replay:  # all is here: the hosts need not be
        return _outcome(record, {p.host: p.ending for p in record.parts if p.ending is not None}, watched)
    beside = [asyncio.create_task(task) for task in (watched.bring_checkpoints(), watched.tell_silence())]
    following = {asyncio.create_task(follower.until_its_end()): host for host, follower in followers.items()}
    endings: dict[str, dict[str, Any]] = {}
    try:
        waiting = set(following)
        while waiting:
            done, waiting = await asyncio.wait(
                waiting,
                return_when=asyncio.FIRST_COMPLETED,
                timeout=GRACE_S if watched.failed_first else None,
            )
            for task in done:
                host = following[task]
                endings[host] = task.result()
                record = record.with_ending(host, endings[host])
                watched.keep(record)
                if watched.failed_first is None and exit_code_of(endings[host]) != 0:
                    watched.failed_first = host
                    if waiting:
                        view.tell(f"{host} has ended: the other hosts are asked to save and end")
                        await _stop_others(record, now=False)
            if not done:  # but graphs are made to their end
                await _stop_others(record, now=True, but=watched.exporting)
    finally:
        for each in (*beside, *following):
            each.cancel()
        await asyncio.gather(*beside, *following, return_exceptions=True)
    fetched = await watched.bring_the_rest(endings)
    watched.keep(record.model_copy(update={"fetched": fetched}))
    return _outcome(record, endings, watched)


def _outcome(record: Record, endings: dict[str, dict[str, Any]], watched: _Watch) -> Outcome:
    failed = (host for host, ending in endings.items() if exit_code_of(ending) != 0)
    host = watched.failed_first or next(failed, record.parts[0].host)
    in_order = {part.host: endings[part.host] for part in record.parts if part.host in endings}
    return Outcome(exit_code=exit_code_of(endings[host]), endings=in_order, fetched=watched.fetched)


async def _stop_others(record: Record, *, now: bool, but: Collection[str] = ()) -> None:
    for part in record.parts:
        if part.ending is None and part.host not in but:
            with contextlib.suppress(ManyhandsError, TimeoutError):
                await stop(part, now=now)


async def stop(part: Part, *, now: bool) -> dict[str, Any]:
    """Ask a part to save and end; `now`: end it at once. Its last status."""
    async with reached(host_named(part.host), docker=part.docker) as there:
        answer = await there.ask("stop", run=part.directory, now=now)
    status: dict[str, Any] = answer["status"]
    return status


def stop_in_words(status: dict[str, Any], *, now: bool) -> str:
    """What a stop does to a training that was in this state."""
    if status["state"] != "running":
        return "has ended already"
    if now:
        return "is killed"
    if status.get("phase") == "exporting":
        return "has ended, and makes ONNX graphs of its checkpoints"
    return "is asked to save and end"


async def state_of(part: Part, *, within_s: float) -> dict[str, Any] | None:
    """The status of a part just now; None where its directory has none. Raises ServerUnreachable after `within_s`."""
    try:
        async with asyncio.timeout(within_s):
            async with reached(host_named(part.host), docker=part.docker) as there:
                status: dict[str, Any] | None = (await there.ask("status", run=part.directory))["status"]
                return status
    except TimeoutError:
        raise ServerUnreachable(f"{part.host} did not answer within {within_s:g} s") from None


def as_asked(ending: dict[str, Any]) -> bool:
    """Whether it was asked to end, by a person or because another host of it had failed."""
    if ending["state"] != "ended":
        return False
    return bool(ending.get("at_once")) or ending["exit_code"] == Interrupted.exit_code


def exit_code_of(ending: dict[str, Any]) -> int:
    """The training's, 128 + number for one that a signal ended; that of a lost worker where nobody knows."""
    return int(ending.get("exit_code", WorkerError.exit_code))


_SIGNALS: Final = {6: "SIGABRT", 7: "SIGBUS", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


_LINES: Final = 10
_LONG: Final = 160
"""So many of the last lines are shown, and so much of each that is no error: the reason stays in sight."""


def words_of(host: str, ending: dict[str, Any]) -> str:
    """How a training ended that did not end well, with the last lines that it printed."""
    if ending["state"] == "never started":
        how = f"nothing was started on {host}"
    elif ending["state"] == "gone":
        how = f"the run's directory on {host} is gone: its disk was lost, or somebody removed it"
    elif ending.get("unreadable"):
        how = f"the status of the training on {host} cannot be read any more (status.json): nobody knows how it ended"
    elif ending["state"] == "lost":
        how = (
            f"{host} was started anew meanwhile, which ended the training"
            if ending.get("restarted")
            else f"the supervisor on {host} was killed, and the training is ended with it; nobody knows its exit code"
        )
    elif ending.get("out_of_memory"):
        how = f"the training on {host} was killed by the kernel, because memory was exhausted"
    elif ending.get("at_once"):
        return f"the training on {host} was asked to end at once, and has ended"
    elif "signal" in ending:
        how = f"the training on {host} was killed by {_SIGNALS.get(ending['signal'], ending['signal'])}"
    elif ending["exit_code"] == Interrupted.exit_code:
        return f"the training on {host} was asked to end, and has ended"
    else:
        how = f"the training on {host} ended with exit code {ending['exit_code']}"
    free = ending.get("free_bytes")
    if free is not None and free < 16 << 20:
        how += f"; its disk is full ({free >> 10} KiB free)"
    tail = [
        line if len(line) <= _LONG or line.startswith("error: ") else f"{line[:_LONG]}..."
        for line in ending.get("tail") or []
    ]
    return how + (
        ". Its last lines:\n" + "\n".join(f"  {line}" for line in tail[-_LINES:])
        if tail
        else "; it printed nothing"
    )
