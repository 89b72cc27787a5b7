"""One rank of a client's group: python work_ranks.py DIRECTORY RANK SIZE TENSOR MICRO KIND writes what it made of a piece of work.

DIRECTORY has plan.yaml, materials/, and given.pt: what goes in.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.distributed import FileStore

from manyhands.engine.settings import Parallel
from manyhands.engine.trainer import EngineTrainer
from manyhands.engine.world import Place, enter_world
from manyhands.plan.resolve import load_plan
from manyhands.tasks.registry import family_of
from manyhands.updates.types import Abandoned


def main(directory: Path, rank: int, size: int, tensor: int, micro: int, kind: str) -> None:
    torch.set_num_threads(1)
    plan = load_plan(directory / "plan.yaml")
    given = torch.load(directory / "given.pt", weights_only=False)
    place = Place(
        rank=rank, world_size=size, local_rank=rank, local_size=size,
        meet=lambda: FileStore(str(directory / f"meeting-{kind}-{tensor}-{micro}"), size),
    )  # fmt: skip
    asked = 0

    def abandoned() -> bool:
        nonlocal asked
        asked += 1
        return kind == "abandoned" and rank == 0 and asked == 3

    with enter_world(place, torch.device("cpu"), Parallel(tensor_parallelism=tensor)) as world:
        task = family_of(plan).open(plan, directory / "materials")
        trainer = EngineTrainer(task, plan, world, micro_batch_size=micro or None, abandoned=abandoned)
        mine = given if world.leads else {"weights": {}, "inner": None, "correction": None, "proximal": 0.0}
        for number, (assignment, terms) in enumerate(given["works"]):
            try:
                if kind == "gradient":
                    done = trainer.gradient(mine["weights"], assignment)
                else:
                    more = {name: mine[name] for name in ("correction", "proximal")}
                    done = trainer.train(mine["weights"], mine["inner"], assignment, terms, **more)
                    mine = {**mine, "inner": done.inner}
            except Abandoned:
                done = f"abandoned, asked {asked} times"
            torch.save(done, directory / f"done-{kind}-{tensor}-{micro}-{rank}-{number}.pt")


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]), *map(int, sys.argv[2:6]), sys.argv[6])
