"""Going on after a connection was lost: again and again, at growing intervals, for a while, and then no more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from manyhands.errors import Refused, ServerUnreachable, WorkerError

T = TypeVar("T")
FIRST_S: Final = 0.5
LONGEST_S: Final = 15.0
GIVE_UP_S: Final = 900.0


@dataclass(slots=True)
class Patience:
    """How long a host has not been there. `tell` hears of each loss and each return, in a sentence."""

    name: str
    tell: Callable[[str], None]
    give_up_s: float = GIVE_UP_S
    was_there: bool = False
    _lost_since: float | None = None
    _pause_s: float = field(default=FIRST_S)

    def answered(self) -> None:
        """The host is there."""
        self.was_there = True
        if self._lost_since is not None:
            self.tell(f"{self.name} is there again after {time.monotonic() - self._lost_since:.0f} s")
        self._lost_since, self._pause_s = None, FIRST_S

    async def lost(self, error: Exception) -> None:
        """Wait before the next attempt. Raises ServerUnreachable when it has been long enough."""
        now = time.monotonic()
        if self._lost_since is None:
            self._lost_since = now
            self.tell(f"{error}; trying again")
        if now - self._lost_since > self.give_up_s:
            raise ServerUnreachable(
                f"{self.name} has not answered for {self.give_up_s / 60:.0f} minutes ({error}); what runs there goes "
                "on by itself: `manyhands hosts attach` shows it once the host is there again"
            )
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(LONGEST_S, self._pause_s * 1.6)


async def patiently(patience: Patience, attempt: Callable[[], Awaitable[T]]) -> T:
    """Attempt it until it does not end by a lost connection. The attempt tells `patience` when the host answers."""
    while True:
        try:
            return await attempt()
        except (ServerUnreachable, TimeoutError) as error:
            await patience.lost(error)
        except (Refused, WorkerError) as error:
            if not patience.was_there:
                raise
            await patience.lost(
                error
            )  # a key that the agent has lost, a container that starts again: it may pass
