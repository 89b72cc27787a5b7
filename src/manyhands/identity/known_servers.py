"""The servers that this machine's clients have met: address -> public key.

At first contact the key is noted; from then on another key at the same address is refused, because it would
be another server, or somebody in between. A key given by the user (--server-key) beats the note and replaces
it.

The file is JSON, mode 0600, written aside and renamed; writers take turns under a lock file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from manyhands.config import home
from manyhands.errors import IdentityError, Refused
from manyhands.identity.keys import is_public_key

_VERSION: Final = 1
_MAX_BYTES: Final = 1 << 20
_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.%]+\]|[^\s:/\[\]#]+):(?P<port>[0-9]{1,5})")


def default_path() -> Path:
    """MANYHANDS_HOME/keys/known_servers.json."""
    return home() / "keys" / "known_servers.json"


def pin(address: str, key: str, *, given: str | None = None, path: Path | None = None) -> bool:
    """Check the key that the server at `address` (host:port) has proved, and note it. True at first contact.

    `given`: what --server-key says; it must equal `key`, and then replaces whatever was noted.
    Raises Refused when the key is not the given or the noted one, IdentityError when the file is unusable.
    """
    address = _normalized(address)
    path = path or default_path()
    if not is_public_key(key):
        raise Refused(
            f"the server at {address} named the key {key[:80]!r}: expected 64 lower-case hex digits"
        )
    if given is not None and given.strip().lower() != key:
        raise Refused(
            f"the server at {address} has the key {key}, but --server-key says {given}. Ask the run's "
            "organizer for the right key; if it cannot be cleared up, do not join."
        )
    with _turn(path):
        known = _read(path)
        noted = known.get(address)
        if noted == key:
            return False
        if noted is not None and given is None:
            raise Refused(
                f"the server at {address} has the key {key}, but at first contact it was {noted} (noted in "
                f"{path}). Somebody may be in between, or the server was set up anew: ask its organizer, and "
                f"if the new key is right, join once with --server-key {key}."
            )
        _write(path, {**known, address: key})
    return noted is None


def known(path: Path | None = None) -> dict[str, str]:
    """All noted servers, address -> public key. Raises IdentityError when the file is unusable."""
    return _read(path or default_path())


def _normalized(address: str) -> str:
    match = _ADDRESS.fullmatch(address.strip())
    if match is None or not 0 < int(match["port"]) < 65_536:
        raise Refused(f"the server's address is {address!r}: expected host:port, such as 127.0.0.1:8700")
    return f"{match['host'].lower()}:{int(match['port'])}"


def _read(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise IdentityError(
            f"cannot read the list of known servers {path}: {error.strerror or error}"
        ) from None
    if os.name == "posix" and mode & 0o022:
        raise IdentityError(
            f"the list of known servers {path} can be written by others (mode {stat.S_IMODE(mode):04o}). "
            f"Look whether its keys are right, then run `chmod 600 {path}`."
        )
    try:
        document = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        document = None
    servers = (
        document.get("servers")
        if isinstance(document, dict) and document.get("version") == _VERSION
        else None
    )
    if not isinstance(servers, dict) or not all(
        isinstance(k, str) and is_public_key(k) for k in servers.values()
    ):
        raise IdentityError(
            f"the list of known servers {path} is not what manyhands writes. Restore it, or remove it: then "
            "the next key that a server shows is believed, so compare it with the organizer's."
        )
    return servers


def _write(path: Path, servers: dict[str, str]) -> None:
    text = json.dumps({"version": _VERSION, "servers": servers}, indent=2, sort_keys=True) + "\n"
    try:
        descriptor, aside = tempfile.mkstemp(prefix=path.name, dir=path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise IdentityError(
            f"cannot write the list of known servers {path}: {error.strerror or error}"
        ) from None


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[None]:
    """One process at a time between reading and writing. Where there is no flock (Windows) the last one
    wins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with path.with_name(path.name + ".lock").open("ab") as lock:
            try:
                import fcntl
            except ImportError:
                pass
            else:
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise IdentityError(
            f"cannot use the list of known servers {path}: {error.strerror or error}"
        ) from None
