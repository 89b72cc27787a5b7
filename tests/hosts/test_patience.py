from __future__ import annotations

import asyncio

import pytest

from manyhands.errors import Refused, ServerUnreachable
from manyhands.hosts.patience import Patience, patiently


def test_what_is_refused_after_a_loss_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by an agent that has lost its keys for a moment; what was refused at first is refused."""
    monkeypatch.setattr("manyhands.hosts.patience.FIRST_S", 0.01)
    told: list[str] = []
    patience = Patience("server1", told.append)
    attempts = 0

    async def attempt() -> str:
        nonlocal attempts
        attempts += 1
        if attempts == 2:
            raise ServerUnreachable("the connection was lost")
        if attempts == 3:
            raise Refused("server1 does not let you in")
        patience.answered()
        if attempts == 1:
            raise ServerUnreachable("cut")
        return "its end"

    assert asyncio.run(patiently(patience, attempt)) == "its end"
    assert told[0] == "cut; trying again"

    async def refused() -> str:
        raise Refused("no")

    with pytest.raises(Refused):
        asyncio.run(patiently(Patience("server2", told.append), refused))
