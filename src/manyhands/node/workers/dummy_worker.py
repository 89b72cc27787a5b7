"""The worker of a dummy task: no torch, no model. It sleeps, sends updates of the plan's size, and applies what
comes back like any other client, so that everything but the training is real."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.effects import Work
from manyhands.coordination.types import Claims
from manyhands.node.workers.channel import open_channel
from manyhands.node.workers.participant_worker import ParticipantWorker
from manyhands.plan.descriptor import RunDescriptor
from manyhands.tasks.dummy import DummyWork
from manyhands.updates.participant import Participant, first_public

_claims = TypeAdapter(Claims)
_work = TypeAdapter(Work)


class DummyWorker(ParticipantWorker):
    """It trains nothing, and its local state does not outlive it."""

    def open(
        self, descriptor: dict[str, Any], directory: str, dummy_delay_s: float | None, **_: Any
    ) -> dict[str, Any]:
        self._run = RunDescriptor.model_validate(descriptor)
        self._directory = Path(directory)
        self._delay_s = dummy_delay_s
        self._dummy = DummyWork(self._run.plan, self._run.parameters)
        return {}

    def _made(self, snapshot: Path) -> Participant:
        plan, parameters = self._run.plan, self._run.parameters
        return Participant(plan, parameters, None, first_public(plan, parameters, snapshot), torch_free=True)

    def work(self, work: dict[str, Any], path: str, **_: Any) -> Any:
        assignment = _work.validate_python(work).assignment
        if self._delay_s:
            time.sleep(self._delay_s)
        claims = self._dummy.write_update(
            assignment, Path(path), abandoned=lambda: self._channel.abandoned(assignment.id)
        )
        return None if claims is None else _claims.dump_python(claims, mode="json")


def main() -> None:
    DummyWorker(open_channel()).serve()


if __name__ == "__main__":
    main()
