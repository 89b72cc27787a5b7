"""The signed run descriptor: what the server promises, and what a client checks before it believes any of
it."""

from __future__ import annotations

import json
from typing import Any, Final

from manyhands.errors import IdentityError, PlanError, ProtocolError, Refused
from manyhands.identity.canonical import sign_document, verify_document
from manyhands.identity.keys import Identity
from manyhands.plan.compatibility import check
from manyhands.plan.descriptor import RunDescriptor
from manyhands.plan.resolve import plan_hash

MAX_DESCRIPTOR_BYTES: Final = 16 << 20
MAX_DEPTH: Final = 40
_DOMAIN: Final = "manyhands run descriptor v1"


def sign_descriptor(identity: Identity, descriptor: RunDescriptor) -> str:
    """The server's signature over the descriptor's canonical bytes: 128 hex digits.

    Raises IdentityError when the descriptor names another server key: nobody would accept it.
    """
    if descriptor.server_key != identity.public:
        raise IdentityError(
            f"the descriptor of run '{descriptor.run_id}' names the server key "
            f"{descriptor.server_key[:16]}..., but the key that should sign it is {identity.public[:16]}..."
        )
    return sign_document(identity, _DOMAIN, descriptor)


def verify_descriptor(
    descriptor: RunDescriptor | str | bytes, signature: str, server_key: str
) -> RunDescriptor:
    """The descriptor, checked: signed by `server_key`, which it names, and consistent in itself.

    Text is loaded first (`load_descriptor`). Raises ProtocolError when it cannot be read, and Refused when
    key, signature or plan hash do not fit or parameters have one name twice, PlanError when this version does
    not support the plan.
    """
    if not isinstance(descriptor, RunDescriptor):
        descriptor = load_descriptor(descriptor)
    run = f"the descriptor of run '{descriptor.run_id}'"
    if descriptor.server_key != server_key:
        raise Refused(
            f"{run} names the server key {descriptor.server_key[:16]}..., but this server has proved "
            f"{server_key[:16]}..."
        )
    if not verify_document(server_key, _DOMAIN, descriptor, signature):
        raise Refused(f"{run} does not bear the signature of the server's key {server_key[:16]}...")
    hashed = plan_hash(descriptor.plan)
    if hashed != descriptor.plan_hash:
        raise Refused(
            f"{run} names the plan hash {descriptor.plan_hash[:16]}..., but its plan hashes to "
            f"{hashed[:16]}... here. Install the server's version of manyhands."
        )
    names = [parameter.name for parameter in descriptor.parameters]
    if len(set(names)) < len(names):
        raise Refused(f"{run} has {len(names) - len(set(names))} parameters whose name is taken")
    check(descriptor.plan, where=run)
    return descriptor


def dump_descriptor(descriptor: RunDescriptor) -> str:
    """The descriptor as JSON text; `load_descriptor` of it gives an equal one."""
    return descriptor.model_dump_json()


def load_descriptor(text: str | bytes) -> RunDescriptor:
    """A descriptor from JSON that somebody else wrote; nothing of it is verified yet.

    Raises ProtocolError for text that is too large or too deep, is not JSON, has a key twice, or does not
    fit.
    """
    if len(text) > MAX_DESCRIPTOR_BYTES:
        raise ProtocolError(
            f"a run descriptor of {len(text)} bytes: at most {MAX_DESCRIPTOR_BYTES} are accepted"
        )
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the run descriptor is not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ProtocolError(f"the run descriptor is a JSON {type(data).__name__}, expected an object")
    _bound_depth(data)
    try:
        return RunDescriptor.parse(data, where="run descriptor")
    except PlanError as error:
        raise ProtocolError(
            f"{error}\nThe server may run another version of manyhands: install the same one."
        ) from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError("a key is there twice")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _bound_depth(data: Any) -> None:
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for value in level
            for item in (
                value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            )
        ]
        if not level:
            return
    raise ProtocolError(f"the run descriptor is nested deeper than {MAX_DEPTH} levels")
