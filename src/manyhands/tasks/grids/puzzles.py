"""What a puzzle is, and puzzles from ARC's files.

The format (github.com/fchollet/ARC-AGI): one JSON object per file, `train` and `test`, each a list of pairs
{"input": grid, "output": grid}, a grid being 1 to 30 rows of 1 to 30 integers from 0 to 9.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from manyhands.errors import DataError
from manyhands.tasks.grids.rules import Grid

Pair: TypeAlias = tuple[Grid, Grid]

LARGEST_GRID: Final = 30
_SHOWN: Final = 40  # characters of a broken value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Puzzle:
    """Pairs of input and output that follow one rule; the last `tests` of them are what is asked."""

    pairs: tuple[Pair, ...]
    tests: int
    origin: Mapping[str, Any]  # plain data: where it comes from

    def largest_side(self) -> int:
        return max(int(side) for pair in self.pairs for grid in pair for side in grid.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArcFiles:
    """A directory as it was read."""

    puzzles: tuple[Puzzle, ...]
    broken: Mapping[str, str]  # file name -> what is wrong
    too_large: tuple[str, ...]  # files with a grid that does not fit


def read_arc(directory: Path, size: int, on_broken: Literal["stop", "skip"]) -> ArcFiles:
    """The *.json files of a directory, by name. Puzzles with a grid larger than `size` are left out and
    listed.

    Raises DataError for a directory that is missing, unreadable or has no puzzle that can be used, and
    with "stop" for the first broken file.
    """
    try:
        files = sorted(file for file in directory.iterdir() if file.suffix == ".json")
    except OSError as error:
        raise DataError(
            f"{directory}: {error.strerror}; give a directory of ARC's JSON files, or 'generated'"
        ) from error
    puzzles: list[Puzzle] = []
    broken: dict[str, str] = {}
    too_large: list[str] = []
    for file in files:
        try:
            puzzle = _puzzle(file)
        except (OSError, ValueError, RecursionError) as error:
            if on_broken == "stop":
                raise DataError(
                    f"{file}: {error}; mend or remove it, or set task.on_broken=skip to go on without it"
                ) from error
            broken[file.name] = str(error)
            continue
        if puzzle.largest_side() > size:
            too_large.append(file.name)
        else:
            puzzles.append(puzzle)
    if not puzzles:
        raise DataError(
            f"{directory}: none of {len(files)} JSON files can be used ({len(broken)} broken, {len(too_large)} with "
            f"a grid larger than task.size {size}): give ARC's files, or raise task.size (at most {LARGEST_GRID})"
        )
    return ArcFiles(puzzles=tuple(puzzles), broken=broken, too_large=tuple(too_large))


def _puzzle(file: Path) -> Puzzle:
    """Raises OSError, or ValueError in words (UnicodeDecodeError and JSONDecodeError are such)."""
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"it holds {_shown(data)}, and an object with 'train' and 'test' is expected")
    train, test = (_pairs(data.get(part), part) for part in ("train", "test"))
    return Puzzle(pairs=train + test, tests=len(test), origin={"file": file.name})


def _pairs(value: Any, part: str) -> tuple[Pair, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'{part}' is {_shown(value)}, and a list of one pair or more is expected")
    pairs = []
    for i, pair in enumerate(value):
        if not isinstance(pair, dict):
            raise ValueError(f"{part}[{i}] is {_shown(pair)}, and 'input' and 'output' are expected")
        made = [_grid(pair.get(side), f"{part}[{i}].{side}") for side in ("input", "output")]
        pairs.append((made[0], made[1]))
    return tuple(pairs)


def _grid(value: Any, where: str) -> Grid:
    if not isinstance(value, list) or not 1 <= len(value) <= LARGEST_GRID:
        raise ValueError(f"{where} is {_shown(value)}, and 1 to {LARGEST_GRID} rows are expected")
    for r, row in enumerate(value):
        if not isinstance(row, list) or not 1 <= len(row) <= LARGEST_GRID:
            raise ValueError(f"{where}, row {r} is {_shown(row)}: expected 1 to {LARGEST_GRID} cells")
        if len(row) != len(value[0]):
            raise ValueError(f"{where}, row {r} has {len(row)} cells, and the first has {len(value[0])}")
        for cell in row:
            if type(cell) is not int or not 0 <= cell <= 9:  # a bool is an int to isinstance
                raise ValueError(f"{where}, row {r} has the cell {_shown(cell)}: expected 0 to 9")
    return np.array(value, dtype=np.uint8)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
