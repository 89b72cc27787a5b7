"""Why a process that was started by hand has ended before the ranks met: a file where the others look for it.

Each looks once when it is started, before it loads torch: what lies there by then is of an earlier start, and ends
nobody. So no clocks are compared. No torch here.
"""

from __future__ import annotations

import json
import os
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

FILE = "rendezvous-refused.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """`token` tells one from the next, also when they say the same."""

    rank: int
    text: str
    token: str


def refusal_in(directory: Path) -> Refusal | None:
    """The latest, if there is one that makes sense; it is replaced whole, so anything else is not ours."""
    try:
        value = json.loads((directory / FILE).read_text(encoding="utf-8"))
        return Refusal(rank=int(value["rank"]), text=str(value["text"]), token=str(value["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def leave_refusal(directory: Path, rank: int, text: str) -> None:
    """For those that wait; where it cannot be written, they wait as long as they would have."""
    refusal = Refusal(rank=rank, text=text, token=uuid.uuid4().hex)
    with suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f".{FILE}.{os.getpid()}"
        aside.write_text(json.dumps(asdict(refusal)), encoding="utf-8")
        aside.replace(directory / FILE)
