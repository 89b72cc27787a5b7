"""A networked run as its server has recorded it: what `simulate(plan, ledger=...)` replays.

Only the log, the materials and the first snapshot are read: the updates and changes that travelled may be gone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from manyhands.config import home
from manyhands.coordination.ledger import RecordedRound, recorded_rounds
from manyhands.coordination.machine import initial_state
from manyhands.coordination.types import BlobRef, Snapshot
from manyhands.errors import StorageError
from manyhands.network.blobs.store import BlobStore
from manyhands.plan.descriptor import RunDescriptor
from manyhands.storage.database import open_database
from manyhands.storage.events import RunLog
from manyhands.storage.runs import get_run


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRun:
    """`materials` and `first_snapshot`: where the blobs are; `rounds`: the closed ones, oldest first."""

    descriptor: RunDescriptor
    rounds: tuple[RecordedRound, ...]
    materials: dict[str, Path]
    first_snapshot: Path

    @classmethod
    def open(cls, run_id: str, data_dir: Path | None = None) -> RecordedRun:
        """From a server's data directory (default: MANYHANDS_HOME/server). Raises StorageError, BlobError."""
        data = data_dir or home() / "server"
        if not (data / "manyhands.db").exists():
            raise StorageError(f"there is no server's database in {data}: name the directory with --data-dir")
        database = open_database(data / "manyhands.db")
        try:
            descriptor = RunDescriptor.model_validate_json(get_run(database, run_id).descriptor)
            records = list(RunLog(database, run_id).all_records())
        finally:
            database.close()
        blobs = BlobStore(data / "blobs")
        first = descriptor.first_snapshot
        snapshot = Snapshot(
            round=0,
            blob=BlobRef(blob=first.blob, size_bytes=first.size_bytes),
            fingerprint=descriptor.first_fingerprint,
        )
        start = initial_state(run_id, descriptor.plan, descriptor.samples, snapshot)
        return cls(
            descriptor=descriptor,
            rounds=recorded_rounds(start, records),
            materials={name: blobs.path(m.blob) for name, m in descriptor.materials.items()},
            first_snapshot=blobs.path(first.blob),
        )

    def lay_out(self, directory: Path) -> Path:
        """The materials under their names in `directory`, as a task opens them."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, path in self.materials.items():
            os.symlink(path.resolve(), directory / name)
        return directory
