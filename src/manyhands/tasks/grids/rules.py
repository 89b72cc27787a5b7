"""The rules of generated puzzles: pure functions from a grid to a grid.

A rule is a family, one of the family's choices and, where the choice needs one, a colour; all of them are
enumerable, so a puzzle can be checked against every other rule of its families (puzzles.py). Rules are total:
they take any grid, also one that another rule has made, which is what compositions do.

A grid is uint8 [rows, columns]: 0 is the background, 1 to 9 are colours. A shape is a set of cells of one
colour that touch along edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Grid: TypeAlias = npt.NDArray[np.uint8]
Cell: TypeAlias = tuple[int, int]

COLOURS: Final = range(1, 10)

_DOWN, _UP, _LEFT, _RIGHT = (1, 0), (-1, 0), (0, -1), (0, 1)
_SIDES: Final = {"down": _DOWN, "up": _UP, "left": _LEFT, "right": _RIGHT}
_RAYS: Final[Mapping[str, tuple[Cell, ...]]] = {
    "horizontal": (_LEFT, _RIGHT),
    "vertical": (_UP, _DOWN),
    "cross": (_LEFT, _RIGHT, _UP, _DOWN),
    "diagonal": ((-1, -1), (-1, 1), (1, -1), (1, 1)),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """Cells (row, column) of one colour that touch along edges."""

    colour: int
    cells: tuple[Cell, ...]


def shapes_of(grid: Grid) -> list[Shape]:
    """All shapes of a grid, in the reading order of their first cells."""
    left = {(int(r), int(c)): int(grid[r, c]) for r, c in np.argwhere(grid)}
    shapes = []
    for start in sorted(left):
        colour = left.pop(start, 0)
        if not colour:
            continue
        cells, open_ = [start], [start]
        while open_:
            r, c = open_.pop()
            for cell in ((r + 1, c), (r - 1, c), (r, c - 1), (r, c + 1)):
                if left.get(cell) == colour:
                    del left[cell]
                    cells.append(cell)
                    open_.append(cell)
        shapes.append(Shape(colour, tuple(cells)))
    return shapes


def falling(grid: Grid, towards: str, _colour: int) -> Grid:
    """Shapes fall as rigid bodies until an edge of the grid or another shape holds them."""
    step, out = _SIDES[towards], grid.copy()
    shapes = shapes_of(grid)
    moved = True
    while moved:
        shapes.sort(key=lambda shape: -max(r * step[0] + c * step[1] for r, c in shape.cells))
        slid = [_slide(out, shape, step) for shape in shapes]
        moved, shapes = slid != shapes, slid
    return out


def gravity(grid: Grid, _choice: str, colour: int) -> Grid:
    """Shapes beside, above or below the block of `colour` slide straight towards it until something holds
    them; the others stay.
    """
    block = np.argwhere(grid == colour)
    out = grid.copy()
    if not len(block):
        return out
    (top, left), (bottom, right) = block.min(axis=0).tolist(), block.max(axis=0).tolist()
    attracted = []
    for shape in shapes_of(grid):
        rows, columns = [r for r, _ in shape.cells], [c for _, c in shape.cells]
        down = _gap(min(rows), max(rows), top, bottom)  # rows to go, positive: downwards
        across = _gap(min(columns), max(columns), left, right)
        if shape.colour != colour and (down == 0) != (across == 0):
            step = (int(np.sign(down)), int(np.sign(across)))
            attracted.append((abs(down) + abs(across), shape, step))
    for _, shape, step in sorted(attracted, key=lambda item: item[0]):  # the nearest first; stable
        _slide(out, shape, step)
    return out


def lines(grid: Grid, rays: str, colour: int) -> Grid:
    """Single cells of `colour` send out lines of it, each to the edge or to the first thing in its way."""
    out = grid.copy()
    for shape in shapes_of(grid):
        if shape.colour != colour or len(shape.cells) > 1:
            continue
        for down, across in _RAYS[rays]:
            r, c = shape.cells[0][0] + down, shape.cells[0][1] + across
            while 0 <= r < grid.shape[0] and 0 <= c < grid.shape[1] and grid[r, c] == 0:
                out[r, c] = colour
                r, c = r + down, c + across
    return out


def mirror(grid: Grid, kind: str, _colour: int) -> Grid:
    """The whole grid reflected or turned; `complete_...`: the reflection is drawn into the background."""
    if kind == "transpose":
        return grid.T.copy()
    if kind == "half_turn":
        return grid[::-1, ::-1].copy()
    reflected = grid[:, ::-1] if kind.endswith("left_right") else grid[::-1]
    return np.where(grid == 0, reflected, grid) if kind.startswith("complete") else reflected.copy()


def keep_some(grid: Grid, which: str, colour: int) -> Grid:
    """Some shapes stay and the others go: by their colour, or by being the largest (all that tie)."""
    if which.endswith("colour"):
        chosen = grid == colour
    else:
        chosen = np.zeros(grid.shape, dtype=bool)
        shapes = shapes_of(grid)
        largest = max((len(shape.cells) for shape in shapes), default=0)
        for shape in shapes:
            if len(shape.cells) == largest:
                chosen[tuple(zip(*shape.cells, strict=True))] = True
    return np.where(chosen == which.startswith("keep"), grid, 0).astype(np.uint8)


def _slide(out: Grid, shape: Shape, step: Cell) -> Shape:
    """Move a shape within `out` by as many steps as are free, in place; where it is now."""
    cells = shape.cells
    for r, c in cells:
        out[r, c] = 0
    while True:
        ahead = tuple((r + step[0], c + step[1]) for r, c in cells)
        if not all(0 <= r < out.shape[0] and 0 <= c < out.shape[1] and out[r, c] == 0 for r, c in ahead):
            break
        cells = ahead
    for r, c in cells:
        out[r, c] = shape.colour
    return Shape(shape.colour, cells)


def _gap(low: int, high: int, wall_low: int, wall_high: int) -> int:
    """From the interval low..high to wall_low..wall_high, signed; 0 where they overlap."""
    return max(wall_low - high, 0) or min(wall_high - low, 0)


# ------------------------------------------------------------------------------ all rules
@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`plain`: choices without a colour; `coloured`: choices that need one."""

    apply: Callable[[Grid, str, int], Grid]
    plain: tuple[str, ...] = ()
    coloured: tuple[str, ...] = ()


FAMILIES: Final[Mapping[str, Family]] = {
    "falling": Family(apply=falling, plain=tuple(_SIDES)),
    "gravity": Family(apply=gravity, coloured=("block",)),
    "lines": Family(apply=lines, coloured=tuple(_RAYS)),
    "mirror": Family(
        apply=mirror,
        plain=(
            "left_right",
            "up_down",
            "transpose",
            "half_turn",
            "complete_left_right",
            "complete_up_down",
        ),
    ),
    "filter": Family(
        apply=keep_some,
        plain=("keep_largest", "remove_largest"),
        coloured=("keep_colour", "remove_colour"),
    ),
}
"""By the names that a plan uses (plan.tasks.GridRule)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; `colour` is 0 for a choice that needs none."""

    family: str
    choice: str
    colour: int = 0

    def __call__(self, grid: Grid) -> Grid:
        return FAMILIES[self.family].apply(grid, self.choice, self.colour)

    def described(self) -> dict[str, Any]:
        """For the record of where a puzzle comes from."""
        colour = {"colour": self.colour} if self.colour else {}
        return {"family": self.family, "choice": self.choice, **colour}


def rules_of(family: str) -> tuple[Rule, ...]:
    """Every rule of a family."""
    found = FAMILIES[family]
    return tuple(Rule(family, choice) for choice in found.plain) + tuple(
        Rule(family, choice, colour) for choice in found.coloured for colour in COLOURS
    )
