"""What a client wants (intents) becomes what has happened (events), after the checks that need no torch.

A client speaks for itself alone: the key of its session must be the one in the intent. An update is taken only
for a commit that the coordinator knows, with the opening that fits it, in the size that the plan gives it, and is
checked on disk (header, schema, length) before its contribution becomes an event. What is refused here never
reaches the log, except that a refused update is recorded as failed work, so that the ledger can say why.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from manyhands.coordination.state import Entry
from manyhands.coordination.types import (
    Committed,
    Contributed,
    Fingerprinted,
    Left,
    Ready,
    SnapshotStored,
    Verdict,
    WorkFailed,
)
from manyhands.errors import BlobError, Refused, UpdateError
from manyhands.identity.contributions import check_contribution, commit
from manyhands.network.messages import IntentBody, Opening, SnapshotOffer
from manyhands.plan.wire import check_header

if TYPE_CHECKING:
    from manyhands.node.server.sessions import Session

MAX_REASON = 500


async def carry_out(session: Session, body: IntentBody) -> None:
    """Do what a client asks for; returns when it is durable. Raises Refused, UpdateError or BlobError."""
    driver, key = session.run.driver, session.client
    match body:
        case Ready() | Fingerprinted():
            _own(body.client, key)
            await driver.submit(body)
        case Committed():
            _own(body.client, key)
            _entry_of(session, body.round, body.assignment)
            await driver.submit(body)
        case Opening():
            await _open(session, body)
        case Contributed():
            await _contribute(session, body)
        case WorkFailed():
            _own(body.client, key)
            _check_reason(body.reason)
            await driver.submit(body)
        case Left():
            _own(body.client, key)
            _check_reason(body.reason)
            if body.how != "left":
                raise Refused(f"a client can leave, but not be '{body.how}' by itself")
            await driver.submit(body)
        case Verdict():
            _own(body.by, key)
            _check_reason(body.reason)
            await driver.submit(body)
        case SnapshotOffer():
            _offer(session, body)
        case SnapshotStored():
            _own(body.by, key)
            path = session.run.blobs.path(body.snapshot.blob.blob)  # raises BlobError if it is not there
            await asyncio.to_thread(check_header, path, session.run.snapshot_schema)
            await session.run.register_blob(body.snapshot.blob, "snapshot", body.snapshot.round)
            await driver.submit(body)


def _own(claimed: str, key: str) -> None:
    if claimed != key:
        raise Refused(f"the session of {key[:8]} cannot speak for {claimed[:8]}")


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON:
        raise Refused(f"a reason of {len(reason)} characters; at most {MAX_REASON} are accepted")


def _entry_of(session: Session, round_number: int, assignment: str) -> Entry:
    """The open assignment of that id, if it is this client's."""
    open_round = session.run.driver.state.rounds.get(round_number)
    entry = open_round.entries.get(assignment) if open_round is not None else None
    if entry is None or entry.assignment.client != session.client:
        raise Refused(f"assignment {assignment} of round {round_number} is not open for this client")
    return entry


def _counted(session: Session, assignment: str) -> bool:
    """Whether something of this client's was merged under this assignment, of late."""
    return any(
        counted.assignment == assignment and counted.client == session.client
        for past in session.run.driver.state.history
        for counted in past.closing.counted
    )


async def _open(session: Session, opening: Opening) -> None:
    """Allow the upload of the update that was committed to, and of no other.

    It is noted before it is there, so that retention finds it even if its client dies in the middle.
    """
    entry = _entry_of(session, opening.round, opening.assignment)
    expected = entry.contribution.commit if entry.contribution is not None else ""
    opened = commit(
        session.run.run_id,
        opening.round,
        session.client,
        opening.assignment,
        opening.update.blob,
        opening.nonce,
    )
    if opened != expected:
        raise Refused(f"the opening of assignment {opening.assignment} does not fit its commit")
    limit = session.run.maximum_update_bytes
    if opening.update.size_bytes > limit:
        raise UpdateError(
            f"an update of {opening.update.size_bytes} bytes; the plan's updates have at most {limit}"
        )
    await session.run.register_blob(opening.update, "update", opening.round)
    session.opened[opening.update.blob] = opening.update.size_bytes


async def _contribute(session: Session, body: Contributed) -> None:
    contribution = body.contribution
    _own(contribution.client, session.client)
    update, claims = contribution.update, contribution.claims
    if update is None or claims is None:
        raise Refused("a contribution needs its update and its claims")
    if _counted(session, contribution.assignment):
        return  # an intent that was repeated after a reconnect, and its round has closed meanwhile
    entry = _entry_of(session, contribution.round, contribution.assignment)
    if entry.status in ("opened", "agreed"):
        return  # it is here already: repeated too
    check_contribution(session.run.run_id, contribution)
    if entry.contribution is None or contribution.commit != entry.contribution.commit:
        raise Refused(f"the contribution to {contribution.assignment} does not fit its commit")
    store = session.run.blobs
    try:
        path = store.path(update.blob)
        if path.stat().st_size != update.size_bytes:
            raise BlobError(f"update {update.blob[:16]}... has another size than claimed")
        await asyncio.to_thread(check_header, path, session.run.update_schema)
    except (UpdateError, BlobError) as error:
        reason = f"update refused: {error}"[:MAX_REASON]
        await session.run.driver.submit(
            WorkFailed(client=session.client, assignment=contribution.assignment, reason=reason)
        )
        raise
    session.opened.pop(update.blob, None)
    await session.run.driver.submit(body)


def _offer(session: Session, offer: SnapshotOffer) -> None:
    asked = session.run.driver.state.snapshot_asked
    if asked is None or asked[0] != offer.round or asked[1] != session.client:
        raise Refused(f"nobody has asked this client for the snapshot at {offer.round}")
    limit = session.run.maximum_snapshot_bytes
    if offer.blob.size_bytes > limit:
        raise UpdateError(f"a snapshot of {offer.blob.size_bytes} bytes; at most {limit} are accepted")
    session.opened[offer.blob.blob] = offer.blob.size_bytes
