"""What a server shows of its runs: the log's account of them, with what live sessions say of themselves.

A view is made once for all who look, when the run or the time has moved on, and not once for each of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from manyhands.coordination.machine import initial_state
from manyhands.coordination.state import RunState
from manyhands.node.server.account import Account, Noted
from manyhands.node.server.run_driver import clock_ms
from manyhands.node.server.served_run import ServedRun
from manyhands.node.server.signed_in import Session, Sessions
from manyhands.node.view import ClientView, RunView

LOOK_EVERY_S = 0.5
BEAT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Shown:
    """A view and what it was made from; `version` counts those that differ in more than the clock."""

    view: RunView
    version: int
    noted: Noted
    state: RunState


class RunViews:
    """Views of runs, each made from the run's account, its coordinator's state and its sessions."""

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        self._accounts: weakref.WeakKeyDictionary[ServedRun, Account] = weakref.WeakKeyDictionary()
        self._latest: weakref.WeakKeyDictionary[ServedRun, _Shown] = weakref.WeakKeyDictionary()

    async def view(self, run: ServedRun) -> RunView:
        """All of a run that is kept in memory. Raises StorageError."""
        return (await self._look(run)).view

    async def ledger(self, run: ServedRun) -> list[dict[str, Any]]:
        """Every closed round: who was assigned what, what came of it, and why. Raises StorageError."""
        return await self._account(run).rounds()

    async def changes(self, run: ServedRun) -> AsyncIterator[RunView | None]:
        """All of it first, then what is new, twice a second at most; None every BEAT_S of silence: a sign of life.

        Ends when the server stops.
        """
        shown = await self._look(run)
        yield shown.view
        quiet_s = 0.0
        while True:
            known_rounds = shown.view.rounds[-1].round + 1 if shown.view.rounds else 0
            known_incidents = shown.noted.forgotten_incidents + len(shown.view.incidents)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_EVERY_S):
                    await run.driver.stopping.wait()
                return
            quiet_s += LOOK_EVERY_S
            before, shown = shown, await self._look(run)
            if shown.version != before.version:
                known = max(0, known_incidents - shown.noted.forgotten_incidents)
                yield shown.view.since(known_rounds, known)
                quiet_s = 0.0
            elif quiet_s >= BEAT_S:
                yield None
                quiet_s = 0.0

    # ------------------------------------------------------------------ inside
    def _account(self, run: ServedRun) -> Account:
        found = self._accounts.get(run)
        if found is None:
            descriptor = run.descriptor
            first = initial_state(run.run_id, descriptor.plan, descriptor.samples, run.first)
            found = self._accounts[run] = Account(run.driver, first, run.directory / "account.json")
        return found

    async def _look(self, run: ServedRun) -> _Shown:
        noted = await self._account(run).noted()
        latest, state = self._latest.get(run), run.driver.state
        if (
            latest is not None
            and latest.noted is noted
            and latest.state is state
            and clock_ms() - latest.view.now_ms < 1000 * LOOK_EVERY_S
        ):
            return latest
        view = self._made(run, noted)
        version = 0
        if latest is not None:
            version = latest.version + (_without_clock(view) != _without_clock(latest.view))
        shown = self._latest[run] = _Shown(view, version, noted, state)
        return shown

    def _made(self, run: ServedRun, noted: Noted) -> RunView:
        state, plan, now_ms = run.driver.state, run.descriptor.plan, clock_ms()
        return RunView(
            run_id=run.run_id,
            name=plan.name,
            phase=state.phase,
            reason=state.reason,
            closed_rounds=state.closed_rounds,
            total_rounds=plan.rounds.total,
            topology=plan.topology,
            preset=plan.preset,
            loss_unit="nats per token" if plan.task.name == "language_model" else "",
            clients=tuple(self._client(run, key, noted.losses.get(key)) for key in state.clients),
            rounds=noted.rounds,
            incidents=noted.incidents,
            evaluations=noted.evaluations,
            checkpoint=noted.checkpoint,
            started_ms=noted.started_ms or now_ms,
            now_ms=now_ms,
        )

    def _client(self, run: ServedRun, key: str, loss: float | None) -> ClientView:
        client = run.driver.state.clients[key]
        session: Session | None = self._sessions.by_client.get((run.run_id, key))
        progress = self._sessions.left.get((run.run_id, key)) if session is None else session.progress
        return ClientView(
            key=key,
            label=client.label,
            status=client.status,
            suspected=client.suspected,
            round=client.round,
            counted=client.counted,
            uncounted=client.uncounted,
            rejoined=client.rejoined,
            loss=progress.loss if progress is not None and progress.loss is not None else loss,
            tokens_per_s=session.progress.tokens_per_s if session is not None else None,
            bytes_up=progress.bytes_up if progress is not None else None,
            bytes_down=progress.bytes_down if progress is not None else None,
            last_heard_ms=session.last_heard_ms if session is not None else None,
        )


def _without_clock(view: RunView) -> RunView:
    return view.model_copy(
        update={
            "now_ms": 0,
            "clients": tuple(c.model_copy(update={"last_heard_ms": None}) for c in view.clients),
        }
    )
