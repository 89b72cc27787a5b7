"""The evaluator's process: the loss of a snapshot on the validation set, and the checkpoint that a person keeps.

A dummy has no model, and then torch is never loaded.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from manyhands.node.workers.channel import open_channel
from manyhands.plan.descriptor import RunDescriptor

NICENESS = 10


class EvaluatorWorker:
    """Operations that the node calls by name."""

    def open(
        self,
        descriptor: dict[str, Any],
        directory: str,
        materials: dict[str, str],
        allowed_tasks: list[str],
    ) -> None:
        """`materials`: where the blobs are; the task sees them under their names in `directory`."""
        with contextlib.suppress(OSError):  # nobody's work waits for this process
            os.nice(NICENESS)
        self._run = RunDescriptor.model_validate(descriptor)
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        for name, blob in materials.items():
            (place / name).unlink(missing_ok=True)
            os.symlink(blob, place / name)
        self._dummy = self._run.plan.task.name == "dummy"
        if not self._dummy:
            import torch

            from manyhands.tasks.registry import family_of

            torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
            self._task = family_of(self._run.plan, allowed=allowed_tasks).open(self._run.plan, place)
            self._model = self._task.build_model()

    def evaluate(self, snapshot: str, round_number: int, checkpoints: str | None) -> dict[str, Any]:
        """`loss` is None for a dummy, which has no model; `checkpoint` is the directory that was written."""
        plan = self._run.plan
        answer: dict[str, Any] = {"loss": None, "samples": 0, "metrics": {}, "checkpoint": None}
        if self._dummy:
            answer["checkpoint"] = snapshot
            return answer
        import torch

        from manyhands.engine.checkpoint import publish
        from manyhands.engine.evaluation import evaluate
        from manyhands.updates.participant import load_public

        public = load_public(Path(snapshot))
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(public.weights[name])
        result = evaluate(
            self._task,
            self._model,
            batches=plan.evaluation.max_batches,
            batch_size=plan.local.batch_size,
        )
        answer.update(loss=result.loss, samples=result.samples, metrics=dict(result.metrics))
        if checkpoints is not None:
            answer["checkpoint"] = str(publish(self._task, self._model, Path(checkpoints), round_number))
        return answer


def main() -> None:
    worker = EvaluatorWorker()
    open_channel().serve({"open": worker.open, "evaluate": worker.evaluate})


if __name__ == "__main__":
    main()
