"""Faults of connections in words that a person can act on."""

from __future__ import annotations

import os
import socket

import aiohttp


def in_words(error: BaseException) -> str:
    """Why there is no connection: what the system says of it, without the library's own wording."""
    cause: BaseException = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, TimeoutError) and not str(cause):
        return "no answer in time"
    if isinstance(cause, OSError) and not isinstance(cause, socket.gaierror) and cause.errno:
        return os.strerror(cause.errno).lower()
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return f"{type(cause).__name__} {cause}".rstrip()
