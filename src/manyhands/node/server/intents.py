"""What a client wants (intents) becomes what has happened (events), after the checks that need no torch.

A client speaks for itself alone: the key of its session must be the one in the intent. An update is taken only
for a commit that the coordinator knows, with the opening that fits it, in the size that the plan gives it, and is
checked on disk (header, schema, length) before its contribution becomes an event. What is refused here never
reaches the log, except that a contribution which is refused is recorded as failed work, so that the ledger can say
why, and nobody waits for it. An intent that would change nothing (repeated after a reconnect, or too late) is
acknowledged and makes no event: whoever repeats itself does not fill the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from manyhands.coordination.events import (
    Committed,
    Contributed,
    Fingerprinted,
    Left,
    Ready,
    SnapshotStored,
    Verdict,
    WorkFailed,
)
from manyhands.coordination.newcomers import fingerprint_at
from manyhands.coordination.presence import is_live
from manyhands.coordination.state import Entry, RunState
from manyhands.coordination.types import BlobRef, ClientId, Contribution
from manyhands.errors import BlobError, Refused, UpdateError
from manyhands.identity.contributions import check_contribution, commit
from manyhands.network.messages import MAX_REASON, IntentBody, Opening, SnapshotOffer, plain_text
from manyhands.node.server.signed_in import Session
from manyhands.plan.wire import Schema, check_header, snapshot_schema


async def carry_out(session: Session, body: IntentBody) -> None:
    """Do what a client asks for; returns when it is durable. Raises Refused, UpdateError or BlobError."""
    driver, key = session.run.driver, session.client
    match body:
        case Ready() | Fingerprinted():
            _own(body.client, key)
        case Committed():
            _own(body.client, key)
            _check_uncommitted(_entry_of(session, body.round, body.assignment), body)
        case Opening():
            return await _open(session, body)
        case Contributed():
            return await _contribute(session, body)
        case WorkFailed():
            _own(body.client, key)
            _check_reason(body.reason)
        case Left():
            _own(body.client, key)
            _check_reason(body.reason)
            if body.how != "left":
                raise Refused(f"a client can leave, but not be '{body.how}' by itself")
        case Verdict():
            _own(body.by, key)
            _check_reason(body.reason)
        case SnapshotOffer():
            return _offer(session, body)
        case SnapshotStored():
            _own(body.by, key)
            if not changes_nothing(driver.state, key, body):
                await _check_snapshot(session, body)
    if not changes_nothing(driver.state, key, body):
        await driver.submit(body)


async def give_up(session: Session, reason: str) -> None:
    """Record that nothing more is to come of what this session works on, and why."""
    driver = session.run.driver
    for open_round in list(driver.state.rounds.values()):
        for identifier, entry in open_round.entries.items():
            if entry.assignment.client == session.client and entry.status in ("assigned", "committed"):
                await _fail(session, identifier, reason)


def changes_nothing(state: RunState, key: ClientId, body: IntentBody) -> bool:
    """Whether the coordinator would only look at this and go on, as it is repeated, late, or for nobody.

    Where in doubt, no: the coordinator knows best. What comes after the end of a session is not looked at here,
    since the answer to it is that the session has ended.
    """
    client = state.clients.get(key)
    if not is_live(client):
        return False
    assert client is not None
    match body:
        case Ready():
            known = client.status == "ready" and client.round is not None and body.round <= client.round
            return known or body.round > state.closed_rounds
        case Committed():
            entry = _entry(state, body.round, body.assignment)
            return entry is None or entry.status != "assigned"
        case WorkFailed():
            return not any(
                (entry := open_round.entries.get(body.assignment)) is not None
                and entry.assignment.client == key
                and entry.status in ("assigned", "committed")
                for open_round in state.rounds.values()
            )
        case Verdict():
            entry = _entry(state, body.round, body.assignment)
            if entry is None or entry.status != "opened" or not entry.revealed:
                return True
            asked = key in state.rounds[body.round].witnesses and key != entry.assignment.client
            return not asked or key in entry.witnesses | entry.objections
        case Fingerprinted():
            if state.plan.topology == "star":
                return fingerprint_at(state, body.round + 1) in (None, body.fingerprint)
            reported = state.reported.get(body.round, {}).get(key)
            past = any(closed.closing.round == body.round for closed in state.history)
            return not past or reported == body.held
        case SnapshotStored():
            return state.snapshot_offered == body.snapshot or body.snapshot in state.snapshots
    return False


def _entry(state: RunState, round_number: int, assignment: str) -> Entry | None:
    open_round = state.rounds.get(round_number)
    return open_round.entries.get(assignment) if open_round is not None else None


def _own(claimed: str, key: str) -> None:
    if claimed != key:
        raise Refused(f"the session of {key[:8]} cannot speak for {claimed[:8]}")


def _check_reason(reason: str) -> None:
    if len(reason) > MAX_REASON:
        raise Refused(f"a reason of {len(reason)} characters; at most {MAX_REASON} are accepted")


def _entry_of(session: Session, round_number: int, assignment: str) -> Entry:
    """The open assignment of that id, if it is this client's."""
    entry = _entry(session.run.driver.state, round_number, assignment)
    if entry is None or entry.assignment.client != session.client:
        raise Refused(f"assignment {assignment} of round {round_number} is not open for this client")
    if entry.status == "given_back":
        raise Refused(f"assignment {assignment} was given back: {entry.reason}")
    return entry


def _check_uncommitted(entry: Entry, body: Committed) -> None:
    """The first commit binds."""
    if entry.contribution is not None and entry.contribution.commit != body.commit:
        raise Refused(f"assignment {body.assignment} was committed to already, with another commit")


def _counted(session: Session, assignment: str) -> bool:
    """Whether something of this client's was merged under this assignment, of late."""
    return any(
        counted.assignment == assignment and counted.client == session.client
        for past in session.run.driver.state.history
        for counted in past.closing.counted
    )


async def _fail(session: Session, assignment: str, reason: str) -> None:
    failed = WorkFailed(client=session.client, assignment=assignment, reason=plain_text(reason, MAX_REASON))
    await session.run.driver.submit(failed)


@asynccontextmanager
async def _recorded(session: Session, assignment: str) -> AsyncIterator[None]:
    """What is wrong with a contribution ends its assignment, with the reason, and is raised."""
    try:
        yield
    except (Refused, UpdateError, BlobError) as error:
        await _fail(session, assignment, f"update refused: {error}")
        raise


async def _open(session: Session, opening: Opening) -> None:
    """Allow the upload of the update that was committed to, and of no other.

    It is noted before it is there, so that retention finds it even if its client dies in the middle.
    """
    entry = _entry_of(session, opening.round, opening.assignment)
    if entry.status in ("opened", "agreed", "refused"):
        return  # late, or repeated
    async with _recorded(session, opening.assignment):
        await _check_opening(session, entry, opening)
        session.announced.add(opening.update)
        await session.run.register_blob(opening.update, "update", opening.round)


async def _check_opening(session: Session, entry: Entry, opening: Opening) -> None:
    run, update = session.run, opening.update
    expected = entry.contribution.commit if entry.contribution is not None else ""
    opened = commit(run.run_id, opening.round, session.client, opening.assignment, update.blob, opening.nonce)
    if opened != expected:
        raise Refused(f"the opening of assignment {opening.assignment} does not fit its commit")
    if update.size_bytes > run.maximum_update_bytes:
        raise UpdateError(
            f"an update of {update.size_bytes} bytes; the plan's updates have at most {run.maximum_update_bytes}"
        )
    for known in await asyncio.to_thread(run.index.get, update.blob):
        if known.ref != update:
            raise UpdateError(
                f"blob {update.blob[:16]}... has {known.ref.size_bytes} bytes, not {update.size_bytes}"
            )


async def _contribute(session: Session, body: Contributed) -> None:
    contribution = body.contribution
    _own(contribution.client, session.client)
    if _counted(session, contribution.assignment):
        return  # an intent that was repeated after a reconnect, and its round has closed meanwhile
    entry = _entry_of(session, contribution.round, contribution.assignment)
    if entry.status in ("opened", "agreed"):
        return  # it is here already: repeated too
    if entry.status == "refused":
        raise Refused(f"the contribution to {contribution.assignment} was refused: {entry.reason}")
    async with _recorded(session, contribution.assignment):
        update = _check_signed(session, entry, contribution)
        await _check_stored(session, update, session.run.update_schema)
    session.announced.done(update.blob)
    await session.run.driver.submit(body)


def _check_signed(session: Session, entry: Entry, contribution: Contribution) -> BlobRef:
    """The update of a contribution that fits its commit and its signature."""
    if contribution.update is None or contribution.claims is None:
        raise Refused("a contribution needs its update and its claims")
    check_contribution(session.run.run_id, contribution)
    if entry.contribution is None or contribution.commit != entry.contribution.commit:
        raise Refused(f"the contribution to {contribution.assignment} does not fit its commit")
    return contribution.update


async def _check_stored(session: Session, ref: BlobRef, schema: Schema) -> None:
    """Whether a payload is here, as long as it says and with the tensors that it must have."""
    path = session.run.blobs.path(ref.blob)
    if path.stat().st_size != ref.size_bytes:
        raise BlobError(f"blob {ref.blob[:16]}... has another size than claimed")
    try:
        await asyncio.to_thread(check_header, path, schema)
    except UpdateError as error:
        raise UpdateError(str(error).replace(str(path), "the file")) from None


def _offer(session: Session, offer: SnapshotOffer) -> None:
    _check_asked(session, offer.round)
    limit = session.run.maximum_snapshot_bytes
    if offer.blob.size_bytes > limit:
        raise UpdateError(f"a snapshot of {offer.blob.size_bytes} bytes; at most {limit} are accepted")
    session.announced.add(offer.blob)


async def _check_snapshot(session: Session, body: SnapshotStored) -> None:
    """Whether it holds what it is said to hold: newcomers start from it."""
    from manyhands.updates.snapshots import load_held  # numpy, which a star's server has no use for

    run, snapshot = session.run, body.snapshot
    _check_asked(session, snapshot.round)
    plan, parameters = run.descriptor.plan, run.descriptor.parameters
    outer = snapshot.outer_fingerprint is not None
    await _check_stored(session, snapshot.blob, snapshot_schema(plan, parameters, outer=outer))
    path = run.blobs.path(snapshot.blob.blob)
    try:
        await asyncio.to_thread(load_held, path, plan, parameters, snapshot.held)
    except UpdateError as error:
        raise UpdateError(str(error).replace(str(path), "the file")) from None
    session.announced.done(snapshot.blob.blob)
    await run.register_blob(snapshot.blob, "snapshot", snapshot.round)


def _check_asked(session: Session, round_number: int) -> None:
    asked = session.run.driver.state.snapshot_asked
    if asked is None or asked[0] != round_number or asked[1] != session.client:
        raise Refused(f"nobody has asked this client for the snapshot at {round_number}")
