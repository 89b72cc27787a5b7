"""A run's account in a file beside it, so that a restarted server reads of the log only what came after.

It is made from the log and from nothing else, and can be made again: what is missing, half, of another program or of
another log is as good as none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ConfigDict, TypeAdapter, ValidationError

from manyhands import __version__
from manyhands.coordination.ledger import Ledger
from manyhands.coordination.records import Record

FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptAccount:
    """What the events up to the one with `seed`, the ledger's latest, have come to."""

    program: str
    run_id: str
    seed: int  # random, so another log has another one there
    started_ms: int | None
    whole: bool
    forgotten_incidents: int
    ledger: Ledger

    def follows(self, latest: Record | None) -> bool:
        """Whether `latest`, the log's record of that number, is the one that this was made from."""
        return latest is not None and (latest.sequence, latest.seed) == (
            self.ledger.state.sequence,
            self.seed,
        )


# A dataclass of its own takes no configuration here, a list of one does.
_kept: TypeAdapter[Any] = TypeAdapter(list[KeptAccount], config=ConfigDict(ser_json_inf_nan="constants"))


def program() -> str:
    """Whose account it is: another version may fold otherwise."""
    return f"manyhands {__version__}, format {FORMAT}"


def write(path: Path, account: KeptAccount) -> None:
    """Written aside and renamed; not synced, since the log can tell it all again. Raises OSError."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    aside.write_bytes(_kept.dump_json([account]))
    aside.replace(path)


def read(path: Path, run_id: str) -> KeptAccount | None:
    """None where there is none that is of any use."""
    try:
        (account,) = _kept.validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None
    kept: KeptAccount = account
    return kept if (kept.program, kept.run_id) == (program(), run_id) else None
