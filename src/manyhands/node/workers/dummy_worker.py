"""The worker of a dummy task: no torch, no model. It sleeps, sends updates of the plan's size, and applies what
comes back like any other client, so that everything but the training is real."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.types import Claims, Closed, Held, Work
from manyhands.errors import UpdateError
from manyhands.node.workers.channel import Channel, open_channel
from manyhands.plan.descriptor import RunDescriptor
from manyhands.tasks.dummy import DummyWork
from manyhands.updates.participant import Participant, first_public

_claims = TypeAdapter(Claims)
_closed = TypeAdapter(Closed)
_work = TypeAdapter(Work)


class DummyWorker:
    """The same operations as a client's worker (client_worker.py)."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._participant: Participant | None = None

    def open(
        self, descriptor: dict[str, Any], directory: str, dummy_delay_s: float | None, **_: Any
    ) -> dict[str, Any]:
        self._run = RunDescriptor.model_validate(descriptor)
        self._directory = Path(directory)
        self._delay_s = dummy_delay_s
        self._dummy = DummyWork(self._run.plan, self._run.parameters)
        return {}

    def load(self, path: str, round: int, held: list[Any], **_: Any) -> None:
        if self._participant is None:
            plan, parameters = self._run.plan, self._run.parameters
            public = first_public(plan, parameters, Path(path))
            self._participant = Participant(plan, parameters, None, public, torch_free=True)
        self._participant.load_public(Path(path), round, Held(*held))

    def work(self, work: dict[str, Any], path: str) -> Any:
        assignment = _work.validate_python(work).assignment
        if self._delay_s:
            time.sleep(self._delay_s)
        claims = self._dummy.write_update(
            assignment, Path(path), abandoned=lambda: self._channel.abandoned(assignment.id)
        )
        return None if claims is None else _claims.dump_python(claims, mode="json")

    def close(self, closed: dict[str, Any], paths: list[str]) -> Held:
        body = _closed.validate_python(closed)
        return self._loaded().close_with(body, [Path(path) for path in paths])

    def check(self, path: str, norm: float) -> str:
        try:
            self._loaded().check(Path(path), norm)
        except UpdateError as error:
            return str(error)
        return ""

    def snapshot(self, path: str) -> Held:
        return self._loaded().save_public(Path(path))

    def _loaded(self) -> Participant:
        assert self._participant is not None, "the node loads a snapshot first"
        return self._participant


def main() -> None:
    channel = open_channel()
    worker = DummyWorker(channel)
    names = ("open", "load", "work", "close", "check", "snapshot")
    channel.serve({name: getattr(worker, name) for name in names})


if __name__ == "__main__":
    main()
