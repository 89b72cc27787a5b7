from __future__ import annotations

import os
import signal

from manyhands.engine.stopping import asked_to_stop


def test_whoever_draws_the_screen_says_what_a_signal_leads_to() -> None:
    told: list[str] = []
    with asked_to_stop(tell=told.append):
        pass
    assert not told
    with asked_to_stop(tell=told.append) as stop:
        stop.outlook = lambda: "saving"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
    assert told == ["SIGTERM: saving; once more to leave at once"]
