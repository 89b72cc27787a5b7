"""Commitments and signatures of contributions, on the very type that coordination stores."""

from dataclasses import replace
from typing import Any

import pytest

from manyhands.coordination.types import BlobRef, Claims, Contribution
from manyhands.errors import Refused, UpdateError
from manyhands.identity.contributions import check_contribution, commit, new_nonce, sign_contribution
from manyhands.identity.keys import Identity, ephemeral

RUN = "run-1"
CLIENT = Identity(bytes(range(32)))
NONCE = "5a" * 32


def contribution(**changes: object) -> Contribution:
    update = BlobRef(blob="ab" * 32, size_bytes=4096)
    made = Contribution(
        assignment="3-7",
        round=3,
        client=CLIENT.public,
        commit=commit(RUN, 3, CLIENT.public, "3-7", update.blob, NONCE),
        update=update,
        nonce=NONCE,
        claims=Claims(norm=1.25, loss=2.5, tokens=768, samples=12, work_ms=900),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def signed(**changes: object) -> Contribution:
    made = contribution(**changes)
    return replace(made, signature=sign_contribution(CLIENT, RUN, made))


def test_a_signed_contribution_is_accepted() -> None:
    check_contribution(RUN, signed())
    check_contribution(RUN, signed(claims=None))


def test_nonces_are_fresh() -> None:
    assert len({new_nonce() for _ in range(10)}) == 10
    assert len(new_nonce()) == 64


def test_the_commit_covers_every_part() -> None:
    parts = (RUN, 3, CLIENT.public, "3-7", "ab" * 32, NONCE)
    others = ("run-2", 4, ephemeral().public, "3-8", "ac" * 32, "5b" * 32)
    commits = {commit(*parts)}
    for i, other in enumerate(others):
        changed: Any = [other if j == i else part for j, part in enumerate(parts)]
        commits.add(commit(*changed))
    assert len(commits) == 1 + len(others)


@pytest.mark.parametrize("nonce", ["", "5a" * 31, "5A" * 32, "zz" * 32, "5a" * 33])
def test_nonces_have_32_bytes(nonce: str) -> None:
    with pytest.raises(UpdateError, match="64 lower-case hex digits"):
        commit(RUN, 3, CLIENT.public, "3-7", "ab" * 32, nonce)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"assignment": "3-8"}, UpdateError),
        ({"round": 4}, UpdateError),
        ({"commit": "00" * 32}, UpdateError),
        ({"update": BlobRef(blob="ac" * 32, size_bytes=4096)}, UpdateError),
        ({"update": None}, UpdateError),
        ({"nonce": "5b" * 32}, UpdateError),
        ({"nonce": "short"}, UpdateError),
        ({"client": "not a key"}, Refused),
        # what the commit does not cover, the signature does
        ({"update": BlobRef(blob="ab" * 32, size_bytes=4097)}, Refused),
        ({"claims": Claims(norm=1.0)}, Refused),
        ({"claims": None}, Refused),
        ({"signature": ""}, Refused),
        ({"signature": "00" * 64}, Refused),
    ],
)
def test_any_change_after_signing_is_found(changes: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        check_contribution(RUN, replace(signed(), **changes))  # type: ignore[arg-type]


def test_another_client_cannot_pass_it_off_as_its_own() -> None:
    thief = ephemeral()
    stolen = replace(signed(), client=thief.public)
    with pytest.raises(UpdateError, match="does not fit its commit"):
        check_contribution(RUN, stolen)
    # knowing the opening, the thief can make a commit of its own, but not for the client
    forged = replace(signed(), commit=commit(RUN, 3, CLIENT.public, "3-7", "cd" * 32, NONCE),
                     update=BlobRef(blob="cd" * 32, size_bytes=4096))  # fmt: skip
    with pytest.raises(Refused, match="signature"):
        check_contribution(RUN, forged)


def test_it_counts_in_one_run_alone() -> None:
    with pytest.raises(UpdateError):
        check_contribution("run-2", signed())
    recommitted = replace(signed(), commit=commit("run-2", 3, CLIENT.public, "3-7", "ab" * 32, NONCE))
    with pytest.raises(Refused):
        check_contribution("run-2", recommitted)


@pytest.mark.parametrize(
    "changes", [{"update": None}, {"commit": "00" * 32}, {"client": "ef" * 32}, {"nonce": ""}]
)
def test_what_would_be_refused_is_not_signed(changes: dict[str, object]) -> None:
    with pytest.raises(UpdateError):
        sign_contribution(CLIENT, RUN, contribution(**changes))
