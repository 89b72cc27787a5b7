"""A client's worker process: does the work, applies closings, keeps local state, all with torch.

With several devices there is such a process for each. Public and local state are rank 0's, which the node speaks to;
the others know the run and take part in its work, with what rank 0 gives them.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch.distributed import FileStore  # type: ignore[attr-defined]

from manyhands.coordination.effects import Work
from manyhands.coordination.types import Claims
from manyhands.engine.device import share_threads
from manyhands.engine.events import Event, Events
from manyhands.engine.faults import in_words
from manyhands.engine.loggers import logging_to
from manyhands.engine.settings import Logging, Parallel
from manyhands.engine.trainer import EngineTrainer, Progress
from manyhands.engine.world import Place, World, device_of, enter_world
from manyhands.errors import StorageError
from manyhands.node.worker_group import RANK_TIMEOUT_S
from manyhands.node.workers.channel import Channel, open_channel
from manyhands.node.workers.participant_worker import ParticipantWorker
from manyhands.plan.descriptor import RunDescriptor
from manyhands.storage.durable import write_whole
from manyhands.tasks.registry import family_of
from manyhands.updates.participant import Participant, load_public
from manyhands.updates.types import Abandoned

PROGRESS_EVERY_S = 0.25

_claims = TypeAdapter(Claims)
_work = TypeAdapter(Work)


class ClientWorker(ParticipantWorker):
    """Public and local state live here; the files are the node's."""

    _world: World

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._others, self._loggers = ExitStack(), ExitStack()
        self._working_on: Work | None = None
        self._unit = "tokens"
        self._started = 0.0
        self._told = 0.0

    def open(
        self,
        descriptor: dict[str, Any],
        directory: str,
        device: str,
        threads: int | None,
        micro_batch_size: int | None,
        allowed_tasks: list[str],
        rank: int = 0,
        data_parallelism: int = 1,
        tensor_parallelism: int = 1,
        meeting: str = "",
        rank_timeout_s: float = RANK_TIMEOUT_S,
        logging: dict[str, Any] | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Open the task, meet the other ranks in the file `meeting`, and build the model."""
        self._run = RunDescriptor.model_validate(descriptor)
        self._directory = Path(directory)
        size = data_parallelism * tensor_parallelism
        place = Place(
            rank=rank,
            world_size=size,
            local_rank=rank,
            local_size=size,
            meet=lambda: FileStore(meeting, size),
        )
        self._place = place
        used = share_threads(threads, size)
        chosen = device_of(place, device)
        if size > 1:
            _stay_on_this_machine()
        sizes = Parallel(data_parallelism=data_parallelism, tensor_parallelism=tensor_parallelism)
        self._world = self._others.enter_context(enter_world(place, chosen, sizes, timeout_s=rank_timeout_s))
        plan = self._run.plan
        task = family_of(plan, allowed=allowed_tasks).open(plan, self._directory / "materials")
        self._unit = task.unit
        figures = Logging.model_validate(logging or {})
        if self._world.leads:
            self._events = self._loggers.enter_context(Events(None, [self._tell_node]))
            self._loggers.enter_context(logging_to(self._events, figures, plan, self._directory))
        self._trainer = EngineTrainer(
            task,
            plan,
            self._world,
            micro_batch_size=micro_batch_size,
            abandoned=self._abandoned,
            on_progress=self._progress,
            stats_every=figures.optim_stats_steps,
            on_stats=lambda step, tensors: self._events.emit("optimizer_stats", step=step, tensors=tensors),
        )
        return {"pid": os.getpid(), "threads": used, "device": str(chosen)}

    def _made(self, snapshot: Path) -> Participant:
        """With the local state of an earlier process; without one the claims say that work starts afresh."""
        participant = Participant(
            self._run.plan,
            self._run.parameters,
            self._trainer,
            load_public(snapshot),
            device=str(self._trainer.device),
            micro_batch=self._trainer.micro_batch_size or 0,
            data_parallelism=self._world.data_size,
            tensor_parallelism=self._world.tensor_size,
        )
        if self._local_file.exists():
            try:
                participant.load_local(self._local_file)
            except StorageError as error:
                print(f"local state is lost, starting afresh: {error}", flush=True)
        return participant

    def work(self, work: dict[str, Any], path: str, **_: Any) -> Any:
        """Do an assignment, as all ranks do together; rank 0 gives its claims, or None if it was abandoned."""
        todo = _work.validate_python(work)
        self._working_on, self._started = todo, time.monotonic()
        try:
            return self._lead(todo, Path(path)) if self._world.leads else self._assist(todo)
        except Abandoned:
            return None
        except RuntimeError as error:
            if self._world.size == 1:
                raise
            told = in_words(error, self._place, self._world.missing_after(error))
            if told is None:
                raise
            raise told from None

    def _assist(self, todo: Work) -> None:
        """Take part in what rank 0 trains; what goes in is rank 0's, and so is what comes of it."""
        if not self._world.told(None):
            return
        if self._run.plan.local.kind == "gradient":
            self._trainer.gradient({}, todo.assignment)
        else:
            self._trainer.train({}, None, todo.assignment, todo.terms)

    def _lead(self, todo: Work, path: Path) -> Any:
        participant = self._loaded()
        done = self._done_before(todo.assignment.id, path)
        self._world.told(done is None)
        if done is not None:
            return done
        claims = _claims.dump_python(participant.work(todo.assignment, todo.terms, path), mode="json")
        if todo.assignment.round % self._run.plan.rounds.save_local_every == 0:
            self._keep_claims({"assignment": todo.assignment.id, "claims": claims})
            participant.save_local(self._local_file)
        return claims

    def _keep_claims(self, claims: dict[str, Any]) -> None:
        """Those of the work before are whole until these are."""
        write_whole(self._claims_file, json.dumps(claims))

    def _done_before(self, assignment: str, path: Path) -> Any:
        """The claims of work that an earlier process did and died before it could say so; None: there is none.

        The saved local state is what decides: the update and its claims were written before it. Doing the work
        once more would start from the state behind it.
        """
        if self._loaded().local.after != assignment or not path.exists():
            return None
        kept = json.loads(self._claims_file.read_text())
        return kept["claims"] if kept["assignment"] == assignment else None

    @property
    def _local_file(self) -> Path:
        return self._directory / "local.safetensors"

    @property
    def _claims_file(self) -> Path:
        return self._directory / "claims.json"

    def _abandoned(self) -> bool:
        return self._working_on is not None and self._channel.abandoned(self._working_on.assignment.id)

    def finish(self) -> None:
        """Let the loggers write what they have: this process ends without a word."""
        self._loggers.close()

    def _tell_node(self, event: Event) -> None:
        if event["kind"] in ("optimizer_stats", "warning"):
            self._channel.notify(event=event)

    def _progress(self, progress: Progress) -> None:
        now = time.monotonic()
        assert self._working_on is not None, "progress of no work"
        terms = self._working_on.terms
        self._events.emit(
            "step",
            step=terms.first_step + progress.step,
            loss=progress.loss,
            learning_rate=terms.learning_rates[min(progress.step, len(terms.learning_rates)) - 1],
            tokens_per_s=progress.tokens / max(now - self._started, 1e-6),
        )
        if now - self._told < PROGRESS_EVERY_S and progress.step < progress.steps:
            return
        self._told = now
        rate = progress.tokens / max(now - self._started, 1e-6)
        self._channel.notify(
            progress={
                "activity": "working",
                "step": progress.step,
                "steps": progress.steps,
                "loss": progress.loss,
                "tokens_per_s": rate,
                "unit": self._unit,
            }
        )


def _stay_on_this_machine() -> None:
    """Let the ranks listen on the loopback interface only."""
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)


def main() -> None:
    ClientWorker(open_channel()).serve()


if __name__ == "__main__":
    main()
