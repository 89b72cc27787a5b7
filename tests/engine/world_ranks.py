"""One rank of two that exchange what they have, and of which the second then stands still: python world_ranks.py
DIRECTORY RANK writes what it was told to <rank>.json."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.distributed import FileStore

from manyhands.engine.faults import in_words
from manyhands.engine.settings import Parallel
from manyhands.engine.world import Place, enter_world
from manyhands.errors import PlanError


def main(directory: Path, rank: int) -> None:
    store = FileStore(str(directory / "meeting"), 2)
    store.add("here", 1)
    while store.add("here", 0) < 2:  # the clock of what follows is not to run while torch is loaded
        time.sleep(0.05)
    place = Place(rank=rank, world_size=2, local_rank=rank, local_size=2, meet=lambda: store)
    with enter_world(place, torch.device("cpu"), Parallel(), timeout_s=4.0) as world:
        weights = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(7)} if rank == 0 else {}
        shared = world.share(weights) or {}
        try:
            world.check_alike("shoe size", (40 + rank,))
            differs = ""
        except PlanError as error:
            differs = str(error)
        world.check_alike("tuple", (1, "two"))
        told = {
            "value": world.told({"x": [rank, 0.1, None]}),
            "nan": math.isnan(world.told(math.nan)),
            "facts": world.gather_data([rank] * (1 + 3 * rank)),
            "arrays": [each["v"].tolist() for each in world.gather_arrays({"v": np.arange(rank + 1)})],
            "shared": {name: [str(t.dtype), t.tolist()] for name, t in shared.items()},
            "differs": differs,
        }
        if rank == 1:
            while not (directory / "0.json").exists():
                time.sleep(0.05)
        else:
            try:
                world.barrier()
            except RuntimeError as error:
                told["missing"] = world.missing_after(error)
                told["words"] = str(in_words(error, place, told["missing"]))
                told["other"] = world.missing_after(RuntimeError("the disk is full"))
        (directory / f"{rank}.part").write_text(json.dumps(told))
        (directory / f"{rank}.part").rename(directory / f"{rank}.json")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
