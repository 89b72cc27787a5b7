"""How long blobs are kept: a closed round's updates for `rounds.keep_updates` rounds, everything else of a run for
good. (A newcomer to a mesh needs the updates since the snapshot that it starts from: those are kept too.)"""

from __future__ import annotations

import asyncio

from manyhands.node.server.served_run import ServedRun


async def forget_old_updates(run: ServedRun) -> None:
    """Delete what is no longer needed, whenever the run has moved on. Goes on until it is cancelled."""
    done = -1
    while True:
        if run.driver.state.closed_rounds != done:
            done = run.driver.state.closed_rounds
            await asyncio.to_thread(_forget, run, _needed_from(run))
        async with run.driver.changed:
            await run.driver.changed.wait()


def _needed_from(run: ServedRun) -> int:
    """The oldest round whose updates somebody may still ask for."""
    state, keep = run.driver.state, run.descriptor.plan.rounds.keep_updates
    oldest = state.closed_rounds - keep
    if run.descriptor.plan.topology == "mesh" and state.history:
        oldest = min(oldest, state.history[0].closing.round)
    return oldest


def _forget(run: ServedRun, before_round: int) -> None:
    names = run.index.deletable_updates(before_round)
    for name in names:
        run.blobs.delete(name)
    run.index.forget_updates(names, before_round)
