"""Signing in: both sides prove that they hold their keys, for this run, this version and this connection.

Both sign the same transcript: all of the client's Hello (its key, nonce, run, boot, the versions that it offered),
the server's key and nonce, the chosen version and the fingerprint of the TLS certificate that the client saw (empty
on loopback without TLS). So a signature is of no use on any other connection, nobody in the middle can change a
word or talk both sides into an older version, and one with another certificate is noticed.
"""

from __future__ import annotations

from typing import Any

from manyhands.errors import Refused
from manyhands.identity.canonical import sign_document, verify_document
from manyhands.identity.contributions import new_nonce
from manyhands.identity.keys import Identity
from manyhands.network.messages import PROTOCOL_VERSIONS, Challenge, Hello, Proof

_DOMAIN = "manyhands sign-in v1"


def choose_version(offered: tuple[int, ...]) -> int:
    """The best version that both speak. Raises Refused naming both lists."""
    common = set(offered) & set(PROTOCOL_VERSIONS)
    if not common:
        ours = ", ".join(map(str, PROTOCOL_VERSIONS))
        theirs = ", ".join(map(str, offered))
        raise Refused(
            f"no common protocol version: the client speaks {theirs}, the server {ours}. "
            "Install the same release of manyhands on both."
        )
    return max(common)


def transcript(
    hello: Hello, server: str, server_nonce: str, version: int, certificate: str
) -> dict[str, Any]:
    """What both sides sign, each under a domain of its own."""
    return {
        "hello": hello,
        "server": server,
        "server_nonce": server_nonce,
        "version": version,
        "certificate": certificate,
    }


def challenge(identity: Identity, hello: Hello, certificate: str = "") -> Challenge:
    """The server's answer to a Hello. Raises Refused when no version is common."""
    version = choose_version(hello.versions)
    nonce = new_nonce()
    text = transcript(hello, identity.public, nonce, version, certificate)
    signature = sign_document(identity, _DOMAIN + " server", text)
    return Challenge(version=version, server=identity.public, nonce=nonce, signature=signature)


def answer(identity: Identity, hello: Hello, received: Challenge, certificate: str = "") -> Proof:
    """The client's answer to a Challenge.

    Raises Refused when the server does not hold the key that it names, has signed another Hello than this one, or
    chose a version that was not offered.
    """
    if received.version not in hello.versions:
        offered = ", ".join(map(str, hello.versions))
        raise Refused(f"the server chose protocol version {received.version}; offered were {offered}")
    text = transcript(hello, received.server, received.nonce, received.version, certificate)
    if not verify_document(received.server, _DOMAIN + " server", text, received.signature):
        raise Refused(
            f"the server could not prove that it holds the key {received.server[:16]}..., or something between it "
            "and this client has changed what was said"
        )
    return Proof(signature=sign_document(identity, _DOMAIN + " client", text))


def check_proof(hello: Hello, sent: Challenge, proof: Proof, certificate: str = "") -> None:
    """The server's check of the client's Proof. Raises Refused."""
    text = transcript(hello, sent.server, sent.nonce, sent.version, certificate)
    if not verify_document(hello.client, _DOMAIN + " client", text, proof.signature):
        raise Refused(
            f"the client could not prove that it holds the key {hello.client[:16]}..., or something between it "
            "and this server has changed what was said"
        )
