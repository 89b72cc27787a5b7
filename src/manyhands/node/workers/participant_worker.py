"""What the two workers of clients have in common: a participant that holds public, and the operations on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.effects import Closed
from manyhands.coordination.types import Closing, Held
from manyhands.errors import UpdateError
from manyhands.node.workers.channel import Channel
from manyhands.plan.descriptor import RunDescriptor
from manyhands.updates.participant import Participant

OPERATIONS = ("open", "load", "work", "close", "check", "snapshot", "finish")

_closed = TypeAdapter(Closed)
_closings = TypeAdapter(tuple[Closing, ...])


class ParticipantWorker:
    """The node calls OPERATIONS by name. A kind of worker adds `open`, `work`, and how its participant is made."""

    _run: RunDescriptor
    _directory: Path

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._participant: Participant | None = None

    def serve(self) -> None:
        self._channel.serve({name: getattr(self, name) for name in OPERATIONS})

    def _made(self, snapshot: Path) -> Participant:
        """The participant, at the first snapshot that this process is given."""
        raise NotImplementedError

    def load(self, path: str, round: int, held: list[Any], settle: list[Any]) -> None:
        """Public from a snapshot. `settle`: closings before it, of which a local state may not have heard."""
        if self._participant is None:
            self._participant = self._made(Path(path))
        self._participant.load_public(Path(path), round, Held(*held))
        self._participant.settle(_closings.validate_python(settle))

    def close(self, closed: dict[str, Any], paths: list[str]) -> Held:
        """Apply a closing; the fingerprints of what is held afterwards."""
        body = _closed.validate_python(closed)
        return self._loaded().close_with(body, [Path(path) for path in paths])

    def check(self, path: str, norm: float) -> str:
        """Why an update is not acceptable; empty if it is."""
        try:
            self._loaded().check(Path(path), norm)
        except UpdateError as error:
            return str(error)
        return ""

    def finish(self) -> None:
        """The node will end this process next."""

    def snapshot(self, path: str) -> Held:
        return self._loaded().save_public(Path(path))

    def _loaded(self) -> Participant:
        assert self._participant is not None, "the node loads a snapshot first"
        return self._participant
