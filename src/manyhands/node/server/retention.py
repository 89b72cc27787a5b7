"""How long blobs are kept: as long as coordination says that somebody may still have to fetch them.

`kept_blobs` is that rule. Beyond it stay what people and a replay need (materials, the first snapshot and the
latest), updates for `rounds.keep_updates` rounds, and whatever a live client that has fallen behind has not applied.
"""

from __future__ import annotations

import asyncio

from manyhands.coordination.presence import live_clients
from manyhands.coordination.snapshots import kept_blobs
from manyhands.coordination.state import RunState
from manyhands.coordination.types import BlobId
from manyhands.node.server.served_run import ServedRun
from manyhands.storage.blob_index import BlobKind


async def forget_old_blobs(run: ServedRun) -> None:
    """Delete what is no longer needed, whenever the run has moved on. Goes on until it is cancelled."""
    done: tuple[int, int] | None = None
    while True:
        state = run.driver.state
        if done != (state.closed_rounds, state.snapshots_taken):
            done = (state.closed_rounds, state.snapshots_taken)
            await _forget(run)
            continue  # the run may have moved on meanwhile
        async with run.driver.changed:
            await run.driver.changed.wait()


async def _forget(run: ServedRun) -> None:
    async with run.keeping:  # a file that is just being kept may have the bytes of an old one
        state = run.driver.state
        before = no_longer_needed_before(state)
        needed = kept_blobs(state) | {run.first.blob.blob}
        found = await asyncio.to_thread(run.index.deletable, before)
        names = [name for name in found if name not in needed]
        run.readable.difference_update(names)
        await asyncio.to_thread(_delete, run, names, before)


def no_longer_needed_before(state: RunState) -> dict[BlobKind, int]:
    """By kind, the round before which a blob goes unless it is among `kept_blobs`.

    What is stored but not yet known to the state is of a later round: a change of the round to be closed, a
    snapshot newer than the latest.
    """
    behind = [client.round for client in live_clients(state) if client.round is not None]
    oldest = min([state.closed_rounds, *behind])
    return {
        "update": min(oldest, state.closed_rounds - state.plan.rounds.keep_updates),
        "change": oldest,
        "snapshot": state.snapshots[-1].round,
    }


def _delete(run: ServedRun, names: list[BlobId], before: dict[BlobKind, int]) -> None:
    for name in names:
        run.blobs.delete(name)
    run.index.forget(names, before)
