"""SIGINT and SIGTERM at any time: the client ends in order, promptly, with exit code 130 and without a traceback."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

PROMPT_S = 8.0


MOMENTS = ["disconnected", "connected", "joined", "catching_up", "phase", "work", "closed"]


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGINT) for moment in MOMENTS),
        *((moment, signal.SIGTERM) for moment in ("disconnected", "joined", "work")),
    ],
)
def test_a_client_can_be_ended_at_any_moment(
    house: Any, dummy_plan: dict[str, Any], until: Callable[..., Any], moment: str, number: signal.Signals
) -> None:
    """Each of these events is followed by something that takes a while: a connection, a worker's start, a download,
    work. "disconnected" is a client that still waits for its server."""
    changes = {"rounds.total": 500, "task.delay_s": 0.3, "membership.min_clients": 1}
    house.plan(dummy_plan, changes)
    if moment != "disconnected":
        house.server()
    client = house.client("ann", "--patient")
    until(lambda: client.said(moment), moment)
    started = time.monotonic()
    client.send(number)
    assert client.ended() == 130, client.text()
    assert time.monotonic() - started < PROMPT_S
    assert f"{number.name}: ending in order" in client.text()
    if moment in ("phase", "work", "closed"):
        until(lambda: house.member(client).get("status") == "left", "the good-bye to be in the ledger")
