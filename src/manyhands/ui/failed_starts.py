"""A training that failed before it began leaves no directory behind: not one of those would ever be gone on from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_BEFORE_THE_START: Final = frozenset({"preparing", "warning"})
"""Events that tell of nothing made."""


@contextmanager
def removed_if_nothing_came_of_it(directory: Path) -> Iterator[None]:
    """Where the body fails and has made `directory`, which holds nothing but its configuration, remove that.

    Prepared data, a checkpoint, any other event, and every file that is not known here make it stay; so does another
    process that trains there.
    """
    there, ended_well = directory.exists(), False
    try:
        yield
        ended_well = True
    finally:
        if not there and not ended_well:
            _remove(directory)


def _remove(directory: Path) -> None:
    from manyhands.errors import Refused
    from manyhands.storage.lock import take_lock

    with suppress(OSError, ValueError, Refused):  # it stays, and the failure is what is told
        if not _is_empty(directory):
            return
        with take_lock(directory, ""):
            empty = _is_empty(directory)
        if empty:
            shutil.rmtree(directory)


def _is_empty(directory: Path) -> bool:
    """Raises OSError where there is none, ValueError for events that are broken."""
    from manyhands.engine.configuration import ENGINE_FILE
    from manyhands.engine.events import read_events
    from manyhands.plan.resolve import PLAN_FILE

    for path in directory.iterdir():
        if path.name == "events.jsonl":
            if any(event["kind"] not in _BEFORE_THE_START for event in read_events(path)):
                return False
        elif path.is_dir():
            if next(path.iterdir(), None) is not None:
                return False
        elif path.name not in (PLAN_FILE, ENGINE_FILE, "lock"):
            return False
    return True
