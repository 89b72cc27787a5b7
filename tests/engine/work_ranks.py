"""One rank of a client's group: python work_ranks.py DIRECTORY RANK SIZE NAME... writes what it made of the works.

Each name is a case of DIRECTORY/<name>.pt, a dictionary; all of them in the same process, so that importing torch is
paid once. What goes in is given to rank 0 alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed import FileStore

from manyhands.engine.settings import Parallel
from manyhands.engine.trainer import EngineTrainer
from manyhands.engine.world import Place, enter_world
from manyhands.tasks.registry import family_of
from manyhands.updates.types import Abandoned


def carry_out(directory: Path, rank: int, size: int, name: str) -> None:
    case: dict[str, Any] = torch.load(directory / f"{name}.pt", weights_only=False)
    place = Place(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_size=size,
        meet=lambda: FileStore(str(directory / f"meeting-{name}"), size),
    )
    asked = 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return rank == 0 and asked == case["abandon_at"]

    parallel = Parallel(tensor_parallelism=case["tensor_parallelism"])
    with enter_world(place, torch.device("cpu"), parallel) as world:
        plan = case["plan"]
        task = family_of(plan).open(plan, case["materials"])
        trainer = EngineTrainer(
            task, plan, world, micro_batch_size=case["micro_batch_size"], abandoned=abandoned
        )
        given = case if world.leads else {"weights": {}, "inner": None, "correction": None, "proximal": 0.0}
        made: list[Any] = []
        inner = given["inner"]
        for assignment, terms in case["works"]:
            try:
                if plan.local.kind == "gradient":
                    made.append(trainer.gradient(given["weights"], assignment))
                else:
                    steering = {key: given[key] for key in ("correction", "proximal")}
                    made.append(trainer.train(given["weights"], inner, assignment, terms, **steering))
                    inner = made[-1].inner if world.leads else None
            except Abandoned:
                made.append(f"abandoned when asked {asked} times")
        torch.save(made, directory / f"{name}-{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[4:]:
        carry_out(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), each)
