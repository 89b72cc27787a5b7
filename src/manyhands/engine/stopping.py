"""How a training ends before its time: by SIGINT or SIGTERM, or because the program that started it is gone.

The first signal asks it to save and end, and says how long that takes; the second has its usual effect.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LOOK_EVERY_S = 0.5
_INSIST_AFTER_S = 30.0


class Stop(threading.Event):
    """Set by the first signal. `outlook`: what it leads to, in words; whoever does the work replaces it."""

    def __init__(self) -> None:
        super().__init__()
        self.outlook: Callable[[], str] = lambda: (
            "leaving as soon as the processes have met (nothing is saved yet)"
        )


@contextmanager
def asked_to_stop(*, quiet: bool = False, tell: Callable[[str], None] | None = None) -> Iterator[Stop]:
    """An event that the first signal sets. Outside the main thread: never set. quiet: another process tells it.

    tell: who says it, by a thread; None: standard error has it at once, whatever else is being written there.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    said, over = "", threading.Event()

    def as_before() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal said
        said = f"{signal.Signals(number).name}: {stop.outlook()}; once more to leave at once"
        stop.set()
        as_before()
        if not quiet and tell is None:  # not print: it may have been interrupted in the middle of a print
            os.write(2, f"{said}\n".encode())

    def tell_of_it() -> None:
        stop.wait()
        if tell is not None and not over.is_set():
            tell(said)

    teller = threading.Thread(target=tell_of_it, name="asked to stop", daemon=True)
    if not quiet and tell is not None:
        teller.start()
    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        as_before()
        if teller.is_alive():
            if not stop.is_set():
                over.set()
                stop.set()
            teller.join()


def end_with_parent() -> None:
    """Ask this process to save and end, as SIGTERM does, once the one that started it is gone; then insist."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_INSIST_AFTER_S)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
