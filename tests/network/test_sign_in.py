"""Signing in: what either side signed is worth nothing once a word of it is another one."""

from __future__ import annotations

from typing import Any

import pytest

from manyhands.errors import Refused
from manyhands.identity.keys import ephemeral
from manyhands.network import sign_in
from manyhands.network.messages import PROTOCOL_VERSIONS, Challenge, Hello, Proof
from manyhands.network.sign_in import answer, challenge, check_proof, choose_version

SERVER, CLIENT, OTHER = ephemeral(), ephemeral(), ephemeral()
CERTIFICATE = "ab" * 32

HELLO = Hello(
    versions=PROTOCOL_VERSIONS,
    run_id="demo-1a2b3c",
    client=CLIENT.public,
    nonce="1" * 64,
    boot="2" * 32,
    label="north",
    seen=(7, 1),
    has_round=3,
    plan_hash="3" * 64,
)
OTHER_HELLO: dict[str, Any] = {
    "versions": (*PROTOCOL_VERSIONS, 99),
    "run_id": "demo-ffffff",
    "client": OTHER.public,
    "nonce": "4" * 64,
    "boot": "5" * 32,
    "label": "south",
    "seen": (8, 1),
    "has_round": None,
    "plan_hash": None,
}


def altered(hello: Hello, field: str) -> Hello:
    return hello.model_copy(update={field: OTHER_HELLO[field]})


def test_both_sides_are_convinced() -> None:
    sent = challenge(SERVER, HELLO, CERTIFICATE)
    proof = answer(CLIENT, HELLO, sent, CERTIFICATE)

    check_proof(HELLO, sent, proof, CERTIFICATE)

    assert sent.server == SERVER.public
    assert sent.version == max(PROTOCOL_VERSIONS)


def test_every_field_of_the_hello_is_covered_here() -> None:
    assert set(OTHER_HELLO) == set(Hello.model_fields) - {"type"}


@pytest.mark.parametrize("field", sorted(OTHER_HELLO))
def test_a_hello_changed_on_its_way_is_noticed_by_the_client(field: str) -> None:
    sent = challenge(SERVER, altered(HELLO, field))  # the server was told something else

    with pytest.raises(Refused, match="could not prove"):
        answer(CLIENT, HELLO, sent)


@pytest.mark.parametrize("field", sorted(OTHER_HELLO))
def test_a_hello_changed_on_its_way_is_noticed_by_the_server(field: str) -> None:
    told = altered(HELLO, field)
    sent = challenge(SERVER, told)
    proof = Proof(signature=_signed_as_client(HELLO, sent))

    with pytest.raises(Refused, match="could not prove"):
        check_proof(told, sent, proof)


@pytest.mark.parametrize("field", ["server", "nonce", "signature"])
def test_a_challenge_changed_on_its_way_is_noticed(field: str) -> None:
    sent = challenge(SERVER, HELLO)
    other = challenge(OTHER, HELLO)
    forged = sent.model_copy(update={field: getattr(other, field)})

    with pytest.raises(Refused, match="could not prove"):
        answer(CLIENT, HELLO, forged)


def test_a_version_that_was_not_offered_is_refused() -> None:
    sent = challenge(SERVER, HELLO).model_copy(update={"version": 99})

    with pytest.raises(Refused, match="chose protocol version 99; offered were 1"):
        answer(CLIENT, HELLO, sent)


def test_a_stripped_list_of_versions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody in the middle talks both sides into an older version: the list itself is signed."""
    monkeypatch.setattr(sign_in, "PROTOCOL_VERSIONS", (1, 2))
    newer = HELLO.model_copy(update={"versions": (1, 2)})
    assert challenge(SERVER, newer).version == 2

    sent = challenge(SERVER, newer.model_copy(update={"versions": (1,)}))

    assert sent.version == 1
    with pytest.raises(Refused, match="changed what was said"):
        answer(CLIENT, newer, sent)


@pytest.mark.parametrize(
    ("client_saw", "server_has"), [("", CERTIFICATE), (CERTIFICATE, ""), ("cd" * 32, CERTIFICATE)]
)
def test_another_certificate_is_noticed(client_saw: str, server_has: str) -> None:
    sent = challenge(SERVER, HELLO, server_has)

    with pytest.raises(Refused):
        answer(CLIENT, HELLO, sent, client_saw)
    with pytest.raises(Refused):
        check_proof(HELLO, sent, Proof(signature=_signed_as_client(HELLO, sent, client_saw)), server_has)


def test_a_proof_is_good_for_one_challenge_only() -> None:
    first = challenge(SERVER, HELLO)
    proof = answer(CLIENT, HELLO, first)
    check_proof(HELLO, first, proof)

    second = challenge(SERVER, HELLO)

    assert second.nonce != first.nonce
    with pytest.raises(Refused, match="could not prove"):
        check_proof(HELLO, second, proof)


def test_the_servers_own_signature_is_no_proof() -> None:
    """A transcript signed by one side cannot be sent back as the other's: their domains differ."""
    myself = HELLO.model_copy(update={"client": SERVER.public})
    sent = challenge(SERVER, myself)

    with pytest.raises(Refused):
        check_proof(myself, sent, Proof(signature=sent.signature))


def test_another_key_does_not_sign_for_this_one() -> None:
    sent = challenge(SERVER, HELLO)

    with pytest.raises(Refused, match=CLIENT.public[:16]):
        check_proof(HELLO, sent, answer(OTHER, HELLO, sent))


@pytest.mark.parametrize("signature", ["0" * 128, "f" * 128])
def test_a_made_up_signature_is_refused(signature: str) -> None:
    sent = challenge(SERVER, HELLO)

    with pytest.raises(Refused):
        check_proof(HELLO, sent, Proof(signature=signature))


@pytest.mark.parametrize(
    ("offered", "ours", "chosen"), [((1,), (1,), 1), ((1, 2, 3), (2, 3, 4), 3), ((3, 1, 2), (1, 2), 2)]
)
def test_the_best_common_version_is_chosen(
    monkeypatch: pytest.MonkeyPatch, offered: tuple[int, ...], ours: tuple[int, ...], chosen: int
) -> None:
    monkeypatch.setattr(sign_in, "PROTOCOL_VERSIONS", ours)

    assert choose_version(offered) == chosen


def test_no_common_version_names_both_lists() -> None:
    with pytest.raises(Refused, match=r"client speaks 7, 8, the server 1\. Install the same release"):
        challenge(SERVER, HELLO.model_copy(update={"versions": (7, 8)}))


def _signed_as_client(hello: Hello, sent: Challenge, certificate: str = "") -> str:
    """What a client would sign that has said `hello`, whatever the server has heard."""
    text = sign_in.transcript(hello, sent.server, sent.nonce, sent.version, certificate)
    return sign_in.sign_document(CLIENT, sign_in._DOMAIN + " client", text)
