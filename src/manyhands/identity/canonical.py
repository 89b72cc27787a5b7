"""Canonical bytes: one value, one spelling, so that hashes and signatures mean the same on every machine.

UTF-8 JSON with keys sorted by code point and no spaces. A float is written as `{"$float": float.hex}`; a key
of a mapping that begins with `$` gets a second one, so nothing else can look like a float: among plain values
two different ones never share their bytes (a tuple counts as a list, a dataclass or pydantic model as the
mapping of its fields; the domain says which kind of document it is).

Whatever is hashed or signed names its domain: a signature for one purpose is worth nothing for another.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Final

from pydantic import BaseModel

from manyhands.errors import ProtocolError
from manyhands.identity.keys import Identity, verify

MAX_DEPTH: Final = 64
_SMALLEST_INT: Final = -(2**63)
_LARGEST_INT: Final = 2**64 - 1


def canonical_bytes(value: Any) -> bytes:
    """The canonical form of None, bool, int (64 bits), float, str, list, tuple, dict with str keys, frozen
    dataclasses and pydantic models.

    Raises ProtocolError, naming the place, for any other type, NaN, infinities, surrogates in text, larger
    integers and nesting deeper than MAX_DEPTH.
    """
    plain = _plain(value, "value", 0)
    return json.dumps(plain, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()


def digest(value: Any, domain: str) -> str:
    """SHA-256 of the value's canonical bytes under `domain`: 64 hex digits."""
    return hashlib.sha256(_separated("digest", domain, value)).hexdigest()


def sign_document(identity: Identity, domain: str, value: Any) -> str:
    """Signature over the value under `domain`: 128 hex digits. Raises ProtocolError as `canonical_bytes`
    does."""
    return identity.sign(_separated("signature", domain, value))


def verify_document(public: str, domain: str, value: Any, signature: str) -> bool:
    """Whether `public` (64 hex digits) signed exactly this value under exactly this domain."""
    return verify(public, signature, _separated("signature", domain, value))


def _separated(purpose: str, domain: str, value: Any) -> bytes:
    """NUL cannot occur in purpose, domain or canonical JSON, so the parts cannot run into each other."""
    if not domain or not domain.isascii() or not domain.isprintable():
        raise ValueError(f"a domain is printable ASCII text, not {domain!r}")
    return b"\0".join((b"manyhands", purpose.encode(), domain.encode(), canonical_bytes(value)))


def _plain(value: Any, at: str, depth: int) -> Any:
    """The value as json.dumps takes it; exact types only, because a subclass may carry more than it shows."""
    if depth > MAX_DEPTH:
        raise ProtocolError(f"{at} is nested deeper than {MAX_DEPTH} levels: it has no canonical form")
    kind = type(value)
    if value is None or kind is bool:
        return value
    if kind is int:
        return _integer(value, at)
    if kind is float:
        return _float(value, at)
    if kind is str:
        return _text(value, at)
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{at}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, dict):
        return {_key(key, at): _plain(item, f"{at}.{key}", depth + 1) for key, item in value.items()}
    names = _field_names(value)
    if names is None:
        raise ProtocolError(
            f"{at} is a {kind.__name__}: only None, bool, int, float, str, list, tuple, "
            "dict, frozen dataclasses and pydantic models have a canonical form"
        )
    return {name: _plain(getattr(value, name), f"{at}.{name}", depth + 1) for name in names}


def _integer(value: int, at: str) -> int:
    if not _SMALLEST_INT <= value <= _LARGEST_INT:
        raise ProtocolError(
            f"{at} is an integer of {value.bit_length()} bits: at most 64 have a canonical form"
        )
    return value


def _float(value: float, at: str) -> dict[str, str]:
    if not math.isfinite(value):
        raise ProtocolError(f"{at} is {value}: only finite numbers have a canonical form")
    return {"$float": value.hex()}


def _text(value: str, at: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ProtocolError(f"{at} is {value[:80]!r}: text with surrogates has no canonical form") from None
    return value


def _key(key: Any, at: str) -> str:
    if type(key) is not str:
        raise ProtocolError(f"{at} has the key {key!r}: only text can be a key in a canonical form")
    return "$" + _text(key, at) if key.startswith("$") else _text(key, at)


def _field_names(value: Any) -> list[str] | None:
    if isinstance(value, BaseModel):
        return list(type(value).model_fields)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        made: Any = type(value)
        if not made.__dataclass_params__.frozen:
            raise ProtocolError(
                f"{type(value).__name__} is a dataclass that can change: freeze it to sign or hash it"
            )
        return [field.name for field in dataclasses.fields(value)]
    return None
