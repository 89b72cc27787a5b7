"""What a server shows of its runs: the log's account of them, with what live sessions say of themselves."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.ledger import Incident, Ledger, RoundAccount, RunAccount
from manyhands.coordination.machine import initial_state
from manyhands.network.messages import Progress
from manyhands.node.server.run_driver import clock_ms
from manyhands.node.server.served_run import ServedRun
from manyhands.node.server.sessions import Session, Sessions
from manyhands.node.view import (
    ClientView,
    CountedView,
    EvaluationView,
    IncidentView,
    RoundView,
    RunView,
    UncountedView,
)

LOOK_EVERY_S = 0.5
BEAT_S = 5.0

_rounds: TypeAdapter[Any] = TypeAdapter(tuple[RoundAccount, ...])


class RunViews:
    """Accounts of runs, each kept up to date from the driver's records as they come."""

    def __init__(self, runs: dict[str, ServedRun], sessions: Sessions) -> None:
        self._runs = runs
        self._sessions = sessions
        self._progress: dict[tuple[str, str], Progress] = {}  # the latest, also of those who have left
        self._ledgers: weakref.WeakKeyDictionary[ServedRun, tuple[Ledger, int]] = weakref.WeakKeyDictionary()

    # ------------------------------------------------------------------ what the dashboard asks for
    def runs(self) -> list[dict[str, Any]]:
        return [self.view(run).summary().model_dump() for run in self._runs.values()]

    def run(self, run_id: str) -> dict[str, Any] | None:
        run = self._runs.get(run_id)
        return None if run is None else self.view(run).model_dump()

    async def changes(self, run: ServedRun) -> AsyncIterator[RunView | None]:
        """All of it first, then what is new, twice a second at most; None every BEAT_S of silence: a sign of life.

        Ends when the server stops.
        """
        view = self.view(run)
        yield view
        quiet_s = 0.0
        while True:
            known_rounds = view.rounds[-1].round + 1 if view.rounds else 0
            known_incidents = len(view.incidents)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(run.driver.stopping.wait(), LOOK_EVERY_S)
                return
            quiet_s += LOOK_EVERY_S
            newer = self.view(run)
            if _without_clock(newer) != _without_clock(view):
                yield newer.since(known_rounds, known_incidents)
                quiet_s = 0.0
            elif quiet_s >= BEAT_S:
                yield None
                quiet_s = 0.0
            view = newer

    # ------------------------------------------------------------------ accounts
    def account(self, run: ServedRun) -> RunAccount:
        """The log's account, up to its last record. In the event loop only: it takes note of new records."""
        ledger, done = self._ledgers.get(run, (None, 0))
        if ledger is None:
            descriptor = run.descriptor
            first = initial_state(run.run_id, descriptor.plan, descriptor.samples, run.first)
            ledger = Ledger(first)
        records = run.driver.records
        for record in records[done:]:
            ledger.add(record)
        self._ledgers[run] = (ledger, len(records))
        return ledger.finished()

    async def ledger(self, run: ServedRun) -> list[dict[str, Any]]:
        """Every closed round: who was assigned what, what came of it, and why."""
        rounds = self.account(run).rounds
        rows: list[dict[str, Any]] = await asyncio.to_thread(_rounds.dump_python, rounds, mode="json")
        return rows

    def view(self, run: ServedRun) -> RunView:
        account, state = self.account(run), run.driver.state
        plan = run.descriptor.plan
        started = run.driver.records[0].now_ms if run.driver.records else clock_ms()
        last_loss = _last_losses(account)
        return RunView(
            run_id=run.run_id,
            name=plan.name,
            phase=state.phase,
            reason=state.reason,
            closed_rounds=state.closed_rounds,
            total_rounds=plan.rounds.total,
            topology=plan.topology,
            preset=plan.preset,
            clients=tuple(self._client(run, key, last_loss.get(key)) for key in state.clients),
            rounds=tuple(_round(r) for r in account.rounds),
            incidents=tuple(_incident(i) for i in account.incidents),
            evaluations=tuple(EvaluationView(round=e.round, loss=e.loss) for e in account.evaluations),
            checkpoint=account.checkpoints[-1].path if account.checkpoints else None,
            started_ms=started,
            now_ms=clock_ms(),
        )

    def _client(self, run: ServedRun, key: str, loss: float | None) -> ClientView:
        client = run.driver.state.clients[key]
        session: Session | None = self._sessions.by_client.get((run.run_id, key))
        if session is not None:
            self._progress[run.run_id, key] = session.progress
        progress = self._progress.get((run.run_id, key))
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
            bytes_up=progress.bytes_up if progress is not None else 0,
            bytes_down=progress.bytes_down if progress is not None else 0,
            last_heard_ms=session.last_heard_ms if session is not None else None,
        )


def _without_clock(view: RunView) -> RunView:
    return view.model_copy(
        update={
            "now_ms": 0,
            "clients": tuple(c.model_copy(update={"last_heard_ms": None}) for c in view.clients),
        }
    )


def _last_losses(account: RunAccount) -> dict[str, float]:
    return {
        work.assignment.client: work.claims.loss
        for round_ in account.rounds[-3:]
        for work in round_.works
        if work.claims is not None and work.claims.loss is not None
    }


def _round(round_: RoundAccount) -> RoundView:
    works = {work.assignment.id: work for work in round_.works}
    counted, losses, tokens = [], [], 0
    for item in round_.closing.counted:
        claims = works[item.assignment].claims
        loss = claims.loss if claims is not None else None
        tokens += claims.tokens if claims is not None else 0
        if loss is not None:
            losses.append(loss)
        counted.append(CountedView(client=item.client, loss=loss, weight=item.weight))
    return RoundView(
        round=round_.number,
        closed_ms=round_.published_ms,
        duration_ms=round_.published_ms - round_.opened_ms,
        mean_loss=sum(losses) / len(losses) if losses else None,
        tokens=tokens,
        counted=tuple(counted),
        uncounted=tuple(UncountedView(client=u.client, reason=u.reason) for u in round_.closing.uncounted),
        fingerprint=round_.fingerprint,
    )


def _incident(incident: Incident) -> IncidentView:
    return IncidentView(
        ms=incident.at_ms,
        client=incident.client,
        what=incident.kind,
        round=incident.round,
        detail=incident.detail,
    )
