"""Ed25519 identities. The public key, 64 lower-case hex digits, is a participant's name everywhere.

A key file is the 32 raw bytes of the seed, readable by its owner alone. It is never overwritten, and the
secret is never shown, logged or pickled: whoever needs it in another process passes the path.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import stat
from pathlib import Path
from typing import Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from manyhands.errors import IdentityError

SEED_BYTES: Final = 32
_PUBLIC = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


class Identity:
    """A key pair. Two are equal when their public keys are."""

    __slots__ = ("_key", "_public")

    def __init__(self, seed: bytes) -> None:
        """`seed`: exactly 32 bytes, from a secure random source. Raises IdentityError for another length."""
        if len(seed) != SEED_BYTES:
            raise IdentityError(f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self._key = Ed25519PrivateKey.from_private_bytes(bytes(seed))
        self._public = self._key.public_key().public_bytes_raw().hex()

    @property
    def public(self) -> str:
        """The public key: 64 lower-case hex digits."""
        return self._public

    def sign(self, data: bytes) -> str:
        """Ed25519 signature (RFC 8032) of `data`: 128 lower-case hex digits. Prefer
        canonical.sign_document."""
        return self._key.sign(data).hex()

    def __repr__(self) -> str:
        return f"Identity(public={self._public})"

    def __eq__(self, other: object) -> bool:
        return self._public == other._public if isinstance(other, Identity) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._public)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Identity holds a secret and is not pickled or copied: pass the key file's path instead"
        )


def verify(public: str, signature: str, data: bytes) -> bool:
    """Whether `signature` (128 hex digits) over `data` was made by `public` (64 hex digits).

    Never raises on malformed text: that is False. Only lower case counts, so that a key has one spelling.
    """
    if not _PUBLIC.fullmatch(public) or not _SIGNATURE.fullmatch(signature):
        return False
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), data)
    except (InvalidSignature, ValueError):
        return False
    return True


def is_public_key(text: str) -> bool:
    """Whether `text` has the form of a public key: 64 lower-case hex digits."""
    return _PUBLIC.fullmatch(text) is not None


def ephemeral() -> Identity:
    """A fresh identity that lives as long as this process."""
    return Identity(secrets.token_bytes(SEED_BYTES))


def create(path: Path | str) -> Identity:
    """Make a new key file (mode 0600; missing directories are made, mode 0700). Never overwrites.

    Raises IdentityError when something is there already or the file cannot be written.
    """
    path = Path(path).expanduser()
    seed = secrets.token_bytes(SEED_BYTES)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise IdentityError(f"cannot make the directory {path.parent}: {error.strerror or error}") from None
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError:
        raise IdentityError(
            f"{path} exists already, and a key is never overwritten. Choose another path, or print its "
            f"public key with `manyhands client show-identity --identity-secret-key-path {_quoted(path)}`."
        ) from None
    except OSError as error:
        raise IdentityError(f"cannot create the key file {path}: {error.strerror or error}") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(seed)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)  # half a key would only be found when it is needed
        raise IdentityError(f"cannot write the key file {path}: {error.strerror or error}") from None
    return Identity(seed)


def load(path: Path | str) -> Identity:
    """Read a key file of exactly 32 raw bytes.

    Raises IdentityError, saying what to do, when it is missing, not a plain file, of another size, or (on
    POSIX) open to anybody but its owner.
    """
    path = Path(path).expanduser()
    try:
        # O_NONBLOCK: a pipe in the file's place must be refused, not waited for
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise IdentityError(
            f"there is no key file {path}. Make one with "
            f"`manyhands client new-identity --identity-secret-key-path {_quoted(path)}`."
        ) from None
    except OSError as error:
        raise IdentityError(f"cannot read the key file {path}: {error.strerror or error}") from None
    try:
        status = os.fstat(descriptor)
        _check_status(path, status)
        seed = os.read(descriptor, SEED_BYTES + 1)
    except OSError as error:
        raise IdentityError(f"cannot read the key file {path}: {error.strerror or error}") from None
    finally:
        os.close(descriptor)
    if len(seed) != SEED_BYTES:
        raise IdentityError(_wrong_size(path, status.st_size))
    return Identity(seed)


def _check_status(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IdentityError(
            f"{path} is not a plain file: a key file holds the {SEED_BYTES} bytes of an Ed25519 seed"
        )
    if os.name == "posix" and status.st_mode & 0o077:
        raise IdentityError(
            f"the key file {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}, expected "
            f"0600). Run `chmod 600 {_quoted(path)}`; if somebody else may have read it, make a new one."
        )
    if status.st_size != SEED_BYTES:
        raise IdentityError(_wrong_size(path, status.st_size))


def _wrong_size(path: Path, size: int) -> str:
    hint = " (64 hex digits? the file holds the raw bytes)" if size in (64, 65) else ""
    return (
        f"the key file {path} has {size} bytes, expected exactly {SEED_BYTES}, the raw Ed25519 seed{hint}. "
        "Restore it, or move it away and make a new one with `manyhands client new-identity`."
    )


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
