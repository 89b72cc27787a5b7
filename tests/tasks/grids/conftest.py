"""A tiny plan of the grids task, prepared once; and directories of puzzles in ARC's format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.plan.schema import Plan
from manyhands.plan.tasks import GeneratedGrids, GridsTask, PixelModel
from manyhands.tasks.grids.task import FAMILY, Grids
from manyhands.tasks.protocol import Prepared


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., Plan]:
    def make(seed: int = 7, **changes: Any) -> Plan:
        settings: dict[str, Any] = {
            "size": 8,
            "generated": GeneratedGrids(puzzles=12, evaluation_puzzles=5),
            "model": PixelModel(width=16, heads=2, encoder_layers=1, decoder_layers=1),
        }
        return Plan(seed=seed, task=GridsTask(**(settings | changes)))

    return make


@pytest.fixture(scope="session")
def prepared(
    plan_for: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Prepared, Path]:
    plan, directory = plan_for(), tmp_path_factory.mktemp("grids")
    return plan, FAMILY.prepare(plan, directory), directory


@pytest.fixture
def task(prepared: tuple[Plan, Prepared, Path]) -> Grids:
    opened = FAMILY.open(prepared[0], prepared[2])
    assert isinstance(opened, Grids)
    return opened


def pair(colour: int, side: int = 3) -> dict[str, Any]:
    """An input of one colour, and an output that is a column narrower and of the next colour."""
    return {"input": [[colour] * side] * side, "output": [[colour + 1] * (side - 1)] * side}


@pytest.fixture
def arc(tmp_path: Path) -> Path:
    """b.json shows two pairs and asks two, a.json shows three and asks one, large.json has 9 columns."""
    directory = tmp_path / "arc"
    directory.mkdir()
    puzzles = {
        "b.json": {"train": [pair(1), pair(2)], "test": [pair(3), pair(4)]},
        "a.json": {"train": [pair(5), pair(6), pair(7)], "test": [pair(8)]},
        "large.json": {"train": [pair(1, 9)], "test": [pair(2)]},
    }
    for name, puzzle in puzzles.items():
        (directory / name).write_text(json.dumps(puzzle))
    return directory
