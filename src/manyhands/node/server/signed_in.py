"""Who is signed in: the sessions of a server, as those see them who serve, show and carry out (sessions.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastapi import WebSocket

from manyhands.network.messages import Progress
from manyhands.node.server.limits import Announced, MessageRate, SigningIn
from manyhands.node.server.served_run import ServedRun

KEPT_LEFT = 10_000


@dataclass(eq=False, slots=True, kw_only=True)
class Session:
    """A signed-in client. `announced`: blobs that it may upload now."""

    client: str
    boot: str
    token: str
    run: ServedRun
    socket: WebSocket
    announced: Announced = field(default_factory=Announced)
    rate: MessageRate = field(default_factory=MessageRate)
    progress: Progress = field(default_factory=Progress)
    last_heard_ms: int = 0


@dataclass(eq=False, slots=True)
class Sessions:
    """All live sessions of a server, by token and by (run, client)."""

    by_token: dict[str, Session] = field(default_factory=dict)
    by_client: dict[tuple[str, str], Session] = field(default_factory=dict)
    left: dict[tuple[str, str], Progress] = field(default_factory=dict)
    """What those who are not here said last: the newest KEPT_LEFT of them."""
    signing_in: SigningIn = field(default_factory=SigningIn)

    def add(self, session: Session) -> None:
        key = (session.run.run_id, session.client)
        self.by_token[session.token] = session
        self.by_client[key] = session
        self.left.pop(key, None)

    def remove(self, session: Session) -> bool:
        """True if it was still the session of its client."""
        self.by_token.pop(session.token, None)
        key = (session.run.run_id, session.client)
        if self.by_client.get(key) is session:
            del self.by_client[key]
            self.left[key] = session.progress
            while len(self.left) > KEPT_LEFT:
                del self.left[next(iter(self.left))]
            return True
        return False
