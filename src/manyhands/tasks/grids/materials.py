"""What is prepared of a set of puzzles: two arrays, read through a memory map, and one line per puzzle.

    <set>.cells.npy     uint8 [pairs, 2, S, S]: input and output, padded at the bottom and on the right with 10
    <set>.puzzles.npy   int32 [puzzles, 3]: first pair, pairs, and how many of them, the last ones, are asked
    grids.json          the sets and their order, S, where each came from, what was left out and why
    puzzles.jsonl       one line per puzzle: its set, number and origin

Nothing is pickled, and arrays are checked when they are opened: they may have come from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from manyhands.errors import DataError
from manyhands.tasks.grids.model import PADDING
from manyhands.tasks.grids.puzzles import Puzzle
from manyhands.tasks.grids.rules import Grid

RECORD: Final = "grids.json"
ORIGINS: Final = "puzzles.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class PuzzleArrays:
    """The puzzles of a set. `cells` uint8 [pairs, 2, S, S], `puzzles` int32 [puzzles, 3]."""

    cells: npt.NDArray[np.uint8]
    puzzles: npt.NDArray[np.int32]

    def grid(self, pair: int, side: int) -> Grid:
        """The input (side 0) or output (1) of a pair, without padding."""
        padded: Grid = self.cells[pair, side]
        inside = padded != PADDING
        return padded[: int(inside[:, 0].sum()), : int(inside[0].sum())]


def names_of(name: str) -> tuple[str, str]:
    """The files of a set."""
    return f"{name}.cells.npy", f"{name}.puzzles.npy"


def write_arrays(directory: Path, name: str, puzzles: Sequence[Puzzle], size: int) -> None:
    """The two arrays of a set; the same puzzles give the same bytes."""
    pairs = sum(len(puzzle.pairs) for puzzle in puzzles)
    cells = np.full((pairs, 2, size, size), PADDING, dtype=np.uint8)
    table = np.empty((len(puzzles), 3), dtype="<i4")
    pair = 0
    for i, puzzle in enumerate(puzzles):
        table[i] = pair, len(puzzle.pairs), puzzle.tests
        for sides in puzzle.pairs:
            for side, grid in enumerate(sides):
                cells[pair, side, : grid.shape[0], : grid.shape[1]] = grid
            pair += 1
    for file, array in zip(names_of(name), (cells, table), strict=True):
        np.save(directory / file, array, allow_pickle=False)


def open_arrays(directory: Path, name: str, size: int) -> PuzzleArrays:
    """The arrays of a set, mapped. Raises DataError for a file that is missing or does not hold what it
    should.
    """
    cells_file, puzzles_file = (directory / file for file in names_of(name))
    cells, table = _map(cells_file), np.asarray(_map(puzzles_file))
    if cells.dtype != np.uint8 or cells.shape[1:] != (2, size, size) or not len(cells):
        raise _not_whole(
            cells_file, f"{cells.dtype} {list(cells.shape)}, not uint8 [pairs, 2, {size}, {size}]"
        )
    if cells.max() > PADDING or (cells[:, :, 0, 0] == PADDING).any():
        raise _not_whole(cells_file, f"values up to {cells.max()}, or an empty grid")
    if table.dtype != np.int32 or table.shape[1:] != (3,) or not len(table):
        raise _not_whole(puzzles_file, f"{table.dtype} {list(table.shape)}, not int32 [puzzles, 3]")
    first, pairs, tests = table.astype(np.int64).T
    if (first < 0).any() or (tests < 1).any() or (pairs <= tests).any() or (first + pairs > len(cells)).any():
        raise _not_whole(
            puzzles_file, f"puzzles that do not lie within the {len(cells)} pairs of {cells_file.name}"
        )
    return PuzzleArrays(cells=cells, puzzles=table)


def keep_first_puzzle(materials: Path, directory: Path, name: str, size: int) -> None:
    """Write into `directory` the arrays of a set with its first puzzle alone. Raises DataError."""
    arrays = open_arrays(materials, name, size)
    first, pairs, tests = arrays.puzzles[0].tolist()
    table = np.array([[0, pairs, tests]], dtype="<i4")
    for file, array in zip(names_of(name), (arrays.cells[first : first + pairs], table), strict=True):
        np.save(directory / file, array, allow_pickle=False)


def _map(file: Path) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DataError(
            f"material {file}: {error.strerror or error}; prepare or fetch the run's materials"
        ) from error
    except (ValueError, EOFError) as error:
        raise _not_whole(file, str(error)) from error
    return array


def _not_whole(file: Path, what: str) -> DataError:
    return DataError(f"material {file} is not whole: {what}; prepare the task again, or fetch it again")


def write_records(directory: Path, record: dict[str, Any], sets: Mapping[str, Sequence[Puzzle]]) -> None:
    """grids.json and puzzles.jsonl."""
    text = json.dumps(record, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    (directory / RECORD).write_text(text, encoding="utf-8")
    with (directory / ORIGINS).open("w", encoding="utf-8") as file:
        for name, puzzles in sets.items():
            for i, puzzle in enumerate(puzzles):
                line = {"set": name, "puzzle": i, **puzzle.origin}
                file.write(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n")


def read_record(directory: Path) -> dict[str, Any]:
    """grids.json. Raises DataError."""
    file = directory / RECORD
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        whole = isinstance(record["size"], int) and all(isinstance(s["name"], str) for s in record["sets"])
    except OSError as error:
        raise DataError(f"material {file}: {error.strerror}; prepare or fetch the run's materials") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _not_whole(file, repr(error)) from error
    if not whole:
        raise _not_whole(file, "no size, or a set without a name")
    return dict(record)
