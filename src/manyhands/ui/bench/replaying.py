"""Does a networked run equal its replay, bit for bit, when the updates that travelled are gone?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from manyhands.errors import WorkerError
from manyhands.network.blobs.store import BlobStore
from manyhands.storage.blob_index import BlobIndex
from manyhands.storage.database import open_database
from manyhands.ui.bench.harness import Measured
from manyhands.ui.demo import Demo, DemoOptions
from manyhands.ui.live import RunScreen

ROUNDS = 12
SMALL = (
    "local.steps=6",
    "task.text.max_bytes=600000",
    "task.model={n_layer: 2, n_head: 2, n_embd: 32}",
    "evaluation.max_batches=2",
)


def replay_equal() -> Measured:
    """A small demo run (three clients, one killed and back), its updates deleted, and then `simulate` of its log."""
    from manyhands.simulation import simulate

    with tempfile.TemporaryDirectory(prefix="manyhands-bench-") as name:
        options = DemoOptions(rounds=ROUNDS, directory=Path(name), overrides=SMALL)
        with RunScreen("none") as screen, Demo(options, screen) as demo:
            demo.start()
            killed = demo.kill_and_bring_back("hand-2")
            demo.watch(lambda view: view.phase == "finished")
        data = demo.directory / "server" / "server"
        deleted = _delete_what_travelled(data, demo.run_id)
        replayed = simulate(ledger=demo.run_id, data_dir=data)
    equal = sum(round_.equal for round_ in replayed.rounds)
    note = f"{equal} of {len(replayed.rounds)} fingerprints equal; {deleted} updates and changes deleted before; "
    note += f"one client killed in round {killed.at_round} and merged again in round {killed.rejoined_round}"
    return Measured(value=float(replayed.equal), note=note)


def _delete_what_travelled(data: Path, run_id: str) -> int:
    """Delete every update and change from the server's blobs; raises WorkerError if there was none."""
    database, store = open_database(data / "manyhands.db"), BlobStore(data / "blobs")
    try:
        index = BlobIndex(database, run_id)
        deleted = sum(
            store.delete(stored.ref.blob) for stored in [*index.all("update"), *index.all("change")]
        )
    finally:
        database.close()
    if deleted == 0:
        raise WorkerError("the server kept no update: nothing was deleted, so the replay would prove little")
    return deleted
