"""One run's account as its server keeps it: the ledger, folded from the log in the storage as that grows.

In memory are the newest rounds alone (KEPT_WORKS, KEPT_INCIDENTS); all of them are read from the storage again when
somebody asks for the whole ledger. So a run of months takes no more memory than one of days. The fold is done in a
thread, and kept in a file every KEEP_EVERY_EVENTS (kept_account.py), from which a restarted server goes on. Who waits
for it waits PATIENCE_S and then takes what there is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.ledger import Incident, Ledger, RoundAccount, account
from manyhands.coordination.records import Record
from manyhands.coordination.state import RunState
from manyhands.coordination.types import ClientId, Fingerprint
from manyhands.node.server import kept_account
from manyhands.node.server.run_driver import RunDriver
from manyhands.node.view import CountedView, EvaluationView, IncidentView, RoundView, UncountedView

KEPT_WORKS = 20_000
"""Some 50 MB, and 200 rounds of 100 clients."""
KEPT_INCIDENTS = 2_000
PATIENCE_S = 2.0
KEEP_EVERY_EVENTS = 20_000
"""What a restart reads again at most: some three seconds' fold."""
_AT_ONCE = 1000

log = logging.getLogger(__name__)
_rounds: TypeAdapter[Any] = TypeAdapter(tuple[RoundAccount, ...])


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """What the events up to `sequence` have come to. Never changed; a newer one takes its place.

    `forgotten_incidents` were before `incidents`; the rounds are all there if `whole`.
    """

    sequence: int = 0
    started_ms: int | None = None
    rounds: tuple[RoundView, ...] = ()
    accounts: tuple[RoundAccount, ...] = ()  # of the same rounds
    whole: bool = True
    incidents: tuple[IncidentView, ...] = ()
    forgotten_incidents: int = 0
    evaluations: tuple[EvaluationView, ...] = ()
    checkpoint: str | None = None
    losses: Mapping[ClientId, float] = field(default_factory=dict)  # the latest of each client


class Account:
    """Reads the driver's log; `initial` is the state before its first event, `kept` the file to go on from."""

    def __init__(self, driver: RunDriver, initial: RunState, kept: Path) -> None:
        self._driver, self._initial, self._kept = driver, initial, kept
        self._opened = False
        self._ledger = Ledger(initial)  # the thread's, as is what follows, but for the task
        self._noted = Noted()
        self._views: dict[int, RoundView] = {}
        self._reading: asyncio.Task[None] | None = None

    async def noted(self) -> Noted:
        """All that the driver has shown so far, if that is to be had soon. Raises StorageError."""
        wanted = self._driver.state.sequence
        end = time.monotonic() + PATIENCE_S
        while self._noted.sequence < wanted and (left_s := end - time.monotonic()) > 0:
            if self._driver.stopping.is_set():
                break
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(asyncio.to_thread(self._read, wanted))
                self._reading.add_done_callback(lambda done: done.cancelled() or done.exception())
            done, _ = await asyncio.wait({self._reading}, timeout=left_s)
            for read in done:
                read.result()
        return self._noted

    async def rounds(self) -> list[dict[str, Any]]:
        """The ledger: every closed round, who was assigned what, what came of it, and why. It waits for all of it."""
        wanted = self._driver.state.sequence
        while (noted := await self.noted()).sequence < wanted and not self._driver.stopping.is_set():
            pass
        return await asyncio.to_thread(self._dumped, noted)

    def _dumped(self, noted: Noted) -> list[dict[str, Any]]:
        if noted.whole:
            both = zip(noted.accounts, noted.rounds, strict=True)
            rounds = tuple(replace(told, fingerprint=view.fingerprint) for told, view in both)
        else:
            records = takewhile(lambda r: r.sequence <= noted.sequence, self._driver.records(0))
            rounds = account(self._initial, records).rounds
        rows: list[dict[str, Any]] = _rounds.dump_python(rounds, mode="json")
        return rows

    # ------------------------------------------------------------------ the thread
    def _open(self, until: int) -> None:
        """Go on from what an earlier start has kept, if it is of this log."""
        kept = kept_account.read(self._kept, self._initial.run_id)
        if kept is None or kept.ledger.state.sequence > until:
            return
        if kept.follows(next(self._driver.records(kept.ledger.state.sequence - 1), None)):
            self._ledger = kept.ledger
            self._noted = Noted(
                started_ms=kept.started_ms, whole=kept.whole, forgotten_incidents=kept.forgotten_incidents
            )

    def _keep(self, latest: Record) -> None:
        """Best effort: without it a restart takes longer."""
        noted = self._noted
        account = kept_account.KeptAccount(
            program=kept_account.program(),
            run_id=self._initial.run_id,
            seed=latest.seed,
            started_ms=noted.started_ms,
            whole=noted.whole,
            forgotten_incidents=noted.forgotten_incidents,
            ledger=self._ledger,
        )
        try:
            kept_account.write(self._kept, account)
        except OSError as error:
            log.warning("the account of run %s is not kept: %s", account.run_id, error)

    def _read(self, until: int) -> None:
        if not self._opened:
            self._open(until)
            self._opened = True
        for record in self._driver.records(self._ledger.state.sequence):
            if record.sequence > until or self._driver.stopping.is_set():
                break
            self._ledger.add(record)
            if self._noted.started_ms is None:
                self._noted = replace(self._noted, started_ms=record.now_ms)
            if record.sequence % _AT_ONCE == 0:
                self._note()
            if record.sequence % KEEP_EVERY_EVENTS == 0:
                self._note()
                self._keep(record)
        self._note()

    def _note(self) -> None:
        ledger, before = self._ledger, self._noted
        known_rounds, known = len(ledger.rounds), len(ledger.incidents)
        first = _first_kept(ledger.rounds)
        if first:
            ledger.forget(first)
        del ledger.incidents[:-KEPT_INCIDENTS]
        forgotten = before.forgotten_incidents + known - len(ledger.incidents)
        total = forgotten + len(ledger.incidents)
        same = total == before.forgotten_incidents + len(before.incidents)
        kept = before.incidents[forgotten - before.forgotten_incidents :]
        self._noted = Noted(
            sequence=ledger.state.sequence,
            started_ms=before.started_ms,
            rounds=self._shown(),
            accounts=tuple(ledger.rounds),
            whole=before.whole and len(ledger.rounds) == known_rounds,
            incidents=kept if same else tuple(_incident(i) for i in ledger.incidents),
            forgotten_incidents=forgotten,
            evaluations=tuple(EvaluationView(round=e.round, loss=e.loss) for e in ledger.evaluations),
            checkpoint=ledger.checkpoints[-1].path if ledger.checkpoints else None,
            losses=_last_losses(ledger.rounds),
        )

    def _shown(self) -> tuple[RoundView, ...]:
        """The rounds' views, each made once, and once more when its fingerprint comes."""
        views: dict[int, RoundView] = {}
        for round_ in self._ledger.rounds:
            view = self._views.get(round_.number)
            fingerprint = self._ledger.fingerprints.get(round_.number, round_.fingerprint)
            if view is None or view.fingerprint != fingerprint:
                view = _round(round_, fingerprint)
            views[round_.number] = view
        self._views = views
        return tuple(views.values())


def _first_kept(rounds: list[RoundAccount]) -> int:
    """The first round to keep if not all of them; 0: all."""
    works = 0
    for round_ in reversed(rounds):
        works += len(round_.works)
        if works > KEPT_WORKS:
            return min(round_.number + 1, rounds[-1].number)
    return 0


def _last_losses(rounds: list[RoundAccount]) -> dict[ClientId, float]:
    return {
        work.assignment.client: work.claims.loss
        for round_ in rounds[-3:]
        for work in round_.works
        if work.claims is not None and work.claims.loss is not None
    }


def _round(round_: RoundAccount, fingerprint: Fingerprint | None) -> RoundView:
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
        fingerprint=fingerprint,
    )


def _incident(incident: Incident) -> IncidentView:
    return IncidentView(
        ms=incident.at_ms,
        client=incident.client,
        what=incident.kind,
        round=incident.round,
        detail=incident.detail,
    )
