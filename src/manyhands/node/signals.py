"""SIGINT and SIGTERM: the first one asks a program to end in order, the second one ends it at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys

from manyhands.errors import Interrupted


def stop_requested() -> asyncio.Event:
    """An event that the first signal sets. Call it once, in the running loop of the main thread."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(name: str) -> None:
        if asked.is_set():
            os._exit(Interrupted.exit_code)
        print(f"{name}: ending in order; once more to leave at once", file=sys.stderr, flush=True)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        # Not on Windows, nor outside the main thread: there it stays as Python does it.
        with contextlib.suppress(NotImplementedError, RuntimeError):
            loop.add_signal_handler(number, on_signal, number.name)
    return asked
