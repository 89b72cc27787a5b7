"""A contribution commits first and is opened later, so that nobody can copy what was not yet shown.

commit = H(run, round, client, assignment, update, nonce): it binds the update, and the nonce hides which one
it is until the opening (update, nonce). The signature covers the run and every field of the contribution, so
a server cannot alter a claim, and a contribution to one run or round says nothing in another.

A contribution is `coordination.types.Contribution`, or anything with its attributes: identity/ stands below
coordination/ and imports none of it.
"""

from __future__ import annotations

import re
import secrets
from typing import Any, Final, Protocol

from manyhands.errors import Refused, UpdateError
from manyhands.identity.canonical import digest, sign_document, verify_document
from manyhands.identity.keys import Identity, is_public_key

_COMMIT_DOMAIN: Final = "manyhands contribution commit v1"
_SIGNATURE_DOMAIN: Final = "manyhands contribution v1"
_NONCE = re.compile(r"[0-9a-f]{64}")


class Blob(Protocol):
    """A payload by content, as coordination.types.BlobRef."""

    @property
    def blob(self) -> str: ...
    @property
    def size_bytes(self) -> int: ...


class Contribution(Protocol):
    """What is signed, as coordination.types.Contribution; `claims` is a frozen dataclass or None."""

    @property
    def assignment(self) -> str: ...
    @property
    def round(self) -> int: ...
    @property
    def client(self) -> str: ...
    @property
    def commit(self) -> str: ...
    @property
    def update(self) -> Blob | None: ...
    @property
    def nonce(self) -> str: ...
    @property
    def claims(self) -> Any: ...
    @property
    def signature(self) -> str: ...


def new_nonce() -> str:
    """32 random bytes as 64 hex digits: a fresh one for each contribution, kept to oneself until the
    opening."""
    return secrets.token_hex(32)


def commit(run_id: str, round: int, client: str, assignment: str, update_blob: str, nonce: str) -> str:
    """The commitment to an update: 64 hex digits. Raises UpdateError for a nonce that is not 64 hex
    digits."""
    if not _NONCE.fullmatch(nonce):
        raise UpdateError(f"the nonce of {assignment} is {nonce[:80]!r}: expected 64 lower-case hex digits")
    value = {
        "run_id": run_id,
        "round": round,
        "client": client,
        "assignment": assignment,
        "update": update_blob,
        "nonce": nonce,
    }
    return digest(value, _COMMIT_DOMAIN)


def sign_contribution(identity: Identity, run_id: str, contribution: Contribution) -> str:
    """The signature of an opened contribution: 128 hex digits; whatever `contribution.signature` holds is
    ignored.

    Raises UpdateError when it is not opened, when its commit does not fit, or when it names another client:
    such a contribution would be refused anyway.
    """
    if contribution.client != identity.public:
        raise UpdateError(
            f"the contribution {contribution.assignment} names the client {contribution.client[:16]}..., but "
            f"the key that should sign it is {identity.public[:16]}..."
        )
    _check_commit(run_id, contribution)
    return sign_document(identity, _SIGNATURE_DOMAIN, _signed(run_id, contribution))


def check_contribution(run_id: str, contribution: Contribution) -> None:
    """Check that an opened contribution fits its commit and was signed by the client that it names.

    Raises UpdateError when it is not opened or the opening does not fit the commit, Refused when the
    signature is not the client's for this run. It does not look at the update itself: updates/ does.
    """
    if not is_public_key(contribution.client):
        raise Refused(
            f"{contribution.client[:80]!r} is not a client's key: expected 64 lower-case hex digits"
        )
    _check_commit(run_id, contribution)
    signed = _signed(run_id, contribution)
    if not verify_document(contribution.client, _SIGNATURE_DOMAIN, signed, contribution.signature):
        raise Refused(
            f"the contribution {contribution.assignment} to run '{run_id}' does not bear the signature of "
            f"the client {contribution.client[:16]}... that it names"
        )


def _check_commit(run_id: str, contribution: Contribution) -> None:
    c = contribution
    if c.update is None:
        raise UpdateError(f"the contribution {c.assignment} is not opened: it names no update")
    expected = commit(run_id, c.round, c.client, c.assignment, c.update.blob, c.nonce)
    if c.commit != expected:
        raise UpdateError(
            f"the opening of {c.assignment} does not fit its commit: committed {c.commit[:16]}..., the "
            f"update {c.update.blob[:16]}... and its nonce give {expected[:16]}..."
        )


def _signed(run_id: str, contribution: Contribution) -> dict[str, Any]:
    c = contribution
    assert c.update is not None  # _check_commit was here
    return {
        "run_id": run_id,
        "assignment": c.assignment,
        "round": c.round,
        "client": c.client,
        "commit": c.commit,
        "update": {"blob": c.update.blob, "size_bytes": c.update.size_bytes},
        "nonce": c.nonce,
        "claims": c.claims,
    }
