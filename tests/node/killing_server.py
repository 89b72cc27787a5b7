"""A server that kills itself at one exact point of each of its lives, and is started again until its run is finished.

    python killing_server.py MODE JOURNAL server run ...

Every life is `manyhands server run ...` in a process of its own (a fork of this one, which has the imports behind
it), makes progress by one append to the log, and ends by SIGKILL:

    after-append     in the instant in which the append is durable: nobody has heard of it. One event per append.
    between-effects  acknowledged, and all of the append's effects delivered but the last one
    before-append    in the instant before the next append: its events are lost, all of the first has been heard

A life in which the run is finished is left alone. The journal (JSON lines) says what was acknowledged, what was
delivered, where each life was killed, and with which state each one began.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from manyhands.coordination.events import Event, ServerStarted
from manyhands.coordination.machine import NumberedEffect
from manyhands.coordination.records import dump_state
from manyhands.node.server import run_driver
from manyhands.node.server.run_driver import RunDriver
from manyhands.storage.events import RunLog
from manyhands.ui.main import run

GOING_OUT_S = 0.1
"""For what has been delivered to reach the wire."""


class Life:
    """The patches of one life. `mode` as above; `journal` is a file descriptor."""

    def __init__(self, mode: str, journal: int) -> None:
        self.mode, self.journal = mode, journal
        self.appends = 0
        self.immune = False  # the run was finished when this life began
        self.dying = False
        self.last_effect: tuple[int, int] | None = None

    def note(self, **facts: Any) -> None:
        os.write(self.journal, (json.dumps(facts) + "\n").encode())

    def die(self, after: int) -> NoReturn:
        self.note(killed_after=after)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("nobody survives this")

    def die_soon(self, after: int) -> None:
        self.dying = True
        threading.Timer(GOING_OUT_S, self.die, (after,)).start()

    # ------------------------------------------------------------------ patches
    def install(self) -> None:
        append, deliver, submit, start = RunLog.append, RunDriver._deliver, RunDriver.submit, RunDriver.start

        def patched_append(
            log: RunLog, epoch: int, expected: int, records: Any, effects: Any, *more: Any, **also: Any
        ) -> None:
            if isinstance(records[0].event, ServerStarted) or self.immune:
                return append(log, epoch, expected, records, effects, *more, **also)
            if self.dying:
                time.sleep(60)
            self.appends += 1
            if self.mode == "before-append" and self.appends == 2:
                self.die(expected)
            self.last_effect = effects[-1].id if effects else None
            append(log, epoch, expected, records, effects, *more, **also)
            if self.mode == "after-append":
                self.die(records[-1].sequence)
            if self.mode == "between-effects" and self.last_effect is None:
                self.die_soon(records[-1].sequence)
            return None

        def patched_deliver(driver: RunDriver, effect: NumberedEffect) -> None:
            if self.mode == "between-effects" and effect.id == self.last_effect and not self.immune:
                self.die_soon(effect.sequence)
                return
            self.note(delivered=effect.id, kind=effect.effect.body.kind)
            deliver(driver, effect)

        async def patched_submit(driver: RunDriver, event: Event) -> int:
            sequence = await submit(driver, event)
            self.note(acknowledged=sequence, kind=event.kind)
            return sequence

        async def patched_start(driver: RunDriver, *arguments: Any) -> None:
            await start(driver, *arguments)
            self.immune = driver.state.phase == "finished"
            self.note(began=driver.state.sequence, state=dump_state(driver.state).decode())

        RunLog.append = patched_append  # type: ignore[method-assign]
        RunDriver._deliver = patched_deliver  # type: ignore[method-assign]
        RunDriver.submit = patched_submit  # type: ignore[method-assign]
        RunDriver.start = patched_start  # type: ignore[method-assign]
        if self.mode == "after-append":
            run_driver.BATCH_EVENTS = 1


def main(mode: str, journal_path: str, arguments: list[str]) -> int:
    journal = os.open(journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    assert threading.active_count() == 1, "only a process with one thread may be forked"
    child = 0
    asked_to_end = False

    def pass_on(number: int, _frame: object) -> None:
        nonlocal asked_to_end
        asked_to_end = True
        if child:
            os.kill(child, number)

    signal.signal(signal.SIGTERM, pass_on)
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            Life(mode, journal).install()
            code = run(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL or asked_to_end:
            return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
