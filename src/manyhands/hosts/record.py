"""What is kept here of a training on hosts: `host.json` in its directory, from which another terminal goes on.

<directory>/host.json        hosts, where they keep the run, how it ended
<directory>/plan.yaml        and engine.yaml: as they were sent
<directory>/events.jsonl     a copy, byte by byte: its size is the offset from which events are asked for
<directory>/logs/<host>.log  likewise of what each host printed
<directory>/checkpoints/     as they come back
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from manyhands.config import Settings, did_you_mean, runs_directory
from manyhands.errors import PlanError, StorageError

FILE: Final = "host.json"


class Part(Settings):
    """One host's share of a training."""

    host: str
    """Its name in the hosts' file."""
    directory: str
    """The run's directory, as the host sees it."""
    docker: bool = False
    """Everything on it happens in its container."""
    rank: int = 0
    """Among the hosts of this training; the first one leads."""
    ending: dict[str, Any] | None = None
    """The last status of its supervisor, once that has ended or is lost."""


class Record(Settings):
    """A training that was started from here."""

    version: int = 1
    """Of this form."""
    run: str
    """Its name, here and on the hosts."""
    parts: tuple[Part, ...]
    """The first one leads: it has the events and the checkpoints."""
    samples_per_step: int = 1
    """For the table."""
    keep: int = 2
    """Checkpoints that stay, here as on the host."""
    shared: bool = False
    """The host writes into this very directory, by a mount: nothing is sent back."""
    fetched: bool = False
    """All that the host made has come back."""

    @property
    def ended(self) -> bool:
        return all(part.ending is not None for part in self.parts)

    def with_ending(self, host: str, ending: dict[str, Any]) -> Record:
        parts = [p.model_copy(update={"ending": ending}) if p.host == host else p for p in self.parts]
        return self.model_copy(update={"parts": tuple(parts)})

    def forget_in(self, directory: Path, before: Record | None) -> None:
        """It has not come to be: what was recorded before is so again. Raises StorageError."""
        if before is not None:
            before.keep_in(directory)
        else:
            (directory / FILE).unlink(missing_ok=True)

    def keep_in(self, directory: Path) -> None:
        """Raises StorageError."""
        aside = directory / f".{FILE}.{os.getpid()}"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            aside.write_text(self.model_dump_json(indent=2), encoding="utf-8")
            aside.replace(directory / FILE)
        except OSError as error:
            raise StorageError(
                f"{directory / FILE}: {error}; free space, or choose another directory"
            ) from error


def recorded(directory: Path) -> Record | None:
    """Of a directory; None where no training on a host was started. Raises StorageError for a broken file."""
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        return Record.parse(json.loads(path.read_text(encoding="utf-8")), where=str(path))
    except (OSError, ValueError, PlanError) as error:
        raise StorageError(f"{path}: {error}; it is written by `manyhands train --host`") from None


def all_recorded(tell: Callable[[str], None] = lambda _text: None) -> dict[Path, Record]:
    """Those in runs/ of MANYHANDS_HOME, by directory, the latest last. A broken one is told of, and left out."""
    files = sorted(runs_directory().glob(f"*/{FILE}"), key=lambda path: path.stat().st_mtime)
    found = {}
    for file in files:
        try:
            record = recorded(file.parent)
        except StorageError as error:
            tell(f"left out: {error}")
            continue
        if record is not None:
            found[file.parent] = record
    return found


def run_named(name: str) -> tuple[Path, Record]:
    """The directory and the record of a run, by its name or its directory. Raises PlanError, which lists them."""
    for directory in (Path(name).expanduser(), runs_directory() / name):
        record = recorded(directory)
        if record is not None:
            return directory, record
    known = [directory.name for directory in all_recorded()]
    raise PlanError(
        f"there is no run '{name}' on a host.{did_you_mean(name, known) or ' None was started from here yet.'}"
    )
