"""The aggregator's process: merges the updates of a star's rounds and advances public, in constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from manyhands.coordination.types import Closing
from manyhands.node.workers.channel import open_channel
from manyhands.plan.descriptor import RunDescriptor
from manyhands.updates.aggregation import Aggregation

_closing = TypeAdapter(Closing)


class AggregatorWorker:
    """Operations that the node calls by name. `fingerprint`: what public must have after `round_number` closings;
    StorageError where it has not, and then nothing was done."""

    def open(
        self,
        descriptor: dict[str, Any],
        directory: str,
        first_public: str,
        round_number: int,
        fingerprint: str | None,
        closing: dict[str, Any] | None,
        snapshot: str | None,
    ) -> dict[str, Any]:
        """`closing` and `snapshot`: see Aggregation.stand_at."""
        run = RunDescriptor.model_validate(descriptor)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._aggregation = Aggregation(
            run.plan,
            run.parameters,
            Path(directory),
            Path(first_public),
            run_id=run.run_id,
            plan_hash=run.plan_hash,
        )
        self._aggregation.stand_at(
            round_number,
            fingerprint,
            closing=None if closing is None else _closing.validate_python(closing),
            snapshot=None if snapshot is None else Path(snapshot),
        )
        return {"round": self._aggregation.round}

    def merge(
        self,
        round_number: int,
        fingerprint: str | None,
        assignment: str,
        path: str,
        weight: int,
        norm: float,
    ) -> float:
        """Check and add an update; its norm. Raises UpdateError, and then nothing was added."""
        self._aggregation.move_on(round_number, fingerprint)
        return self._aggregation.merge(
            assignment, Path(path), round_number=round_number, weight=weight, norm=norm
        )

    def advance(
        self, closing: dict[str, Any], fingerprint: str | None, change_path: str, paths: list[str]
    ) -> dict[str, Any]:
        """`paths`: of the counted updates, in case that the sum holds another one, accepted too late to count."""
        body, aggregation = _closing.validate_python(closing), self._aggregation
        aggregation.move_on(body.round, fingerprint)
        counted = tuple(item.assignment for item in body.counted)
        if aggregation.round == body.round and aggregation.merged != counted:
            aggregation.restart_round()
            for item, path in zip(body.counted, paths, strict=True):
                aggregation.merge(
                    item.assignment,
                    Path(path),
                    round_number=body.round,
                    weight=item.weight,
                    norm=None,
                    factor=item.factor,
                )
        return {"fingerprint": aggregation.advance(body, Path(change_path))}

    def snapshot(self, path: str, round_number: int, fingerprint: str | None) -> dict[str, Any]:
        self._aggregation.move_on(round_number, fingerprint)
        found = self._aggregation.snapshot(Path(path))
        return {"round": self._aggregation.round, "fingerprint": found}


def main() -> None:
    worker = AggregatorWorker()
    open_channel().serve(
        {"open": worker.open, "merge": worker.merge, "advance": worker.advance, "snapshot": worker.snapshot}
    )


if __name__ == "__main__":
    main()
