"""Generated puzzles: scenes of random shapes, and one rule or two that turn each into its answer.

A puzzle is made from (seed, set, index) alone, so neither order nor the number of processes matters, and it
is kept only if it is worth solving:

- in every pair, each rule changes something, and the answer is neither blank nor too large;
- of two rules, each shows: the second alone would give another answer than both;
- no two answers of a puzzle are equal;
- the rule is visible: no other rule of the same family that explains all pairs but one gives another answer
  to that one. So whichever pair is asked, the others tell.

What fails is drawn again, at most TRIES times; a puzzle's origin keeps its rules, its seed, the number of
tries and what was rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Final

import numpy as np

from manyhands.errors import DataError
from manyhands.plan.tasks import GeneratedGrids
from manyhands.tasks.grids.puzzles import Pair, Puzzle
from manyhands.tasks.grids.rules import COLOURS, Cell, Grid, Rule, rules_of

TRIES: Final = 200
SCENE_TRIES: Final = 12
"""Scenes drawn per pair of a puzzle before its rules are given up."""

_PLACES: Final = 12  # tried for a shape before it is left out


def generate(settings: GeneratedGrids, size: int, seed: int, group: int, index: int) -> Puzzle:
    """Puzzle `index` of a set: `group` is 0 for training, 1, 2, ... for sets of evaluation.

    Raises DataError if nothing acceptable came in TRIES tries: a grid too small for the rules.
    """
    generator = np.random.default_rng([seed, group, index])
    rejected: Counter[str] = Counter()
    for tries in range(1, TRIES + 1):
        rules = _draw_rules(settings, generator)
        sides = generator.integers(max(5, size * 2 // 3), size + 1, 2)
        shape = (int(sides[0]), int(sides[1]))
        pairs = _draw_pairs(settings.examples, rules, shape, size, generator, rejected)
        fault = fault_of(pairs, rules) if pairs else None
        if pairs and fault is None:
            origin = {
                "rules": [rule.described() for rule in rules],
                "seed": [seed, group, index],
                "tries": tries,
                "rejected": dict(sorted(rejected.items())),
            }
            return Puzzle(pairs=pairs, tests=1, origin=origin)
        if fault is not None:
            rejected[fault] += 1
    reasons = ", ".join(f"{fault} {n}" for fault, n in rejected.most_common())
    raise DataError(
        f"no puzzle number {index} from the rules {', '.join(settings.rules)} in {TRIES} tries on grids of "
        f"{size} x {size} (rejected: {reasons}): raise task.size, lower task.generated.examples, or choose more rules"
    )


def fault_of(pairs: Sequence[Pair], rules: Sequence[Rule]) -> str | None:
    """Why these pairs make no puzzle, in a word: unchanged, covered, blank, alike or hidden."""
    for scene, answer in pairs:
        if fault := _fault_of_pair(scene, answer, rules):
            return fault
    for (_, one), (_, other) in combinations(pairs, 2):
        if np.array_equal(one, other):
            return "alike"
    for place, rule in enumerate(rules):
        for other_rule in rules_of(rule.family):
            if other_rule != rule and _differs_once(pairs, (*rules[:place], other_rule, *rules[place + 1 :])):
                return "hidden"
    return None


def apply_all(rules: Sequence[Rule], grid: Grid) -> Grid:
    """One rule after the other."""
    for rule in rules:
        grid = rule(grid)
    return grid


def _fault_of_pair(scene: Grid, answer: Grid, rules: Sequence[Rule]) -> str | None:
    grid = scene
    for rule in rules:
        after = rule(grid)
        if np.array_equal(after, grid):
            return "unchanged"
        grid = after
    if np.array_equal(scene, answer):  # the second took back what the first did
        return "unchanged"
    if (answer == answer[0, 0]).all():
        return "blank"
    if len(rules) > 1 and np.array_equal(apply_all(rules[1:], scene), answer):
        return "covered"
    return None


def _differs_once(pairs: Sequence[Pair], rules: Sequence[Rule]) -> bool:
    """Whether these rules give exactly one pair another answer: asked for that one, nobody could tell."""
    different = 0
    for scene, answer in pairs:
        different += not np.array_equal(apply_all(rules, scene), answer)
        if different > 1:
            return False
    return different == 1


# ------------------------------------------------------------------------------ drawing
def _draw_rules(settings: GeneratedGrids, generator: np.random.Generator) -> tuple[Rule, ...]:
    families = sorted(set(settings.rules))
    two = len(families) > 1 and generator.random() < settings.compositions
    chosen = [families[i] for i in generator.permutation(len(families))[: 2 if two else 1]]
    colours = [int(colour) for colour in generator.permutation(COLOURS)]  # different ones for the two
    rules = []
    for family in chosen:
        choices = sorted({(rule.choice, rule.colour > 0) for rule in rules_of(family)})
        choice, coloured = choices[generator.integers(len(choices))]
        rules.append(Rule(family, choice, colours.pop() if coloured else 0))
    return tuple(rules)


def _draw_pairs(
    count: int,
    rules: Sequence[Rule],
    shape: tuple[int, int],
    size: int,
    generator: np.random.Generator,
    rejected: Counter[str],
) -> tuple[Pair, ...]:
    """Pairs that are good one by one, or none if for one of them no scene would do; what was rejected is
    counted.
    """
    pairs: list[Pair] = []
    for _ in range(count * SCENE_TRIES):
        scene = _scene(rules, shape, generator)
        answer = apply_all(rules, scene)
        fault = "too large" if max(answer.shape) > size else _fault_of_pair(scene, answer, rules)
        if fault is not None:
            rejected[fault] += 1
            continue
        pairs.append((scene, answer))
        if len(pairs) == count:
            return tuple(pairs)
    return ()


def _scene(rules: Sequence[Rule], shape: tuple[int, int], generator: np.random.Generator) -> Grid:
    """A grid with what each rule needs to work on, and some more shapes of other colours."""
    grid: Grid = np.zeros(shape, dtype=np.uint8)
    for rule in rules:
        if rule.family == "gravity":
            block = generator.integers(2, 4, 2)
            cells = [(r, c) for r in range(block[0]) for c in range(block[1])]
            _place(grid, cells, rule.colour, generator)
        elif rule.family == "lines":
            for _ in range(generator.integers(1, 4)):
                _place(grid, [(0, 0)], rule.colour, generator)
        elif rule.colour:
            _place(grid, polyomino(int(generator.integers(2, 6)), generator), rule.colour, generator)
    others = [colour for colour in COLOURS if colour not in {rule.colour for rule in rules}]
    for _ in range(generator.integers(2, 5)):
        colour = others[generator.integers(len(others))]
        _place(grid, polyomino(int(generator.integers(1, 7)), generator), colour, generator)
    return grid


def polyomino(cells: int, generator: np.random.Generator) -> list[Cell]:
    """A random connected shape of so many cells, grown from one; its smallest row and column are 0."""
    grown = [(0, 0)]
    while len(grown) < cells:
        r, c = grown[generator.integers(len(grown))]
        down, across = ((1, 0), (-1, 0), (0, 1), (0, -1))[generator.integers(4)]
        if (r + down, c + across) not in grown:
            grown.append((r + down, c + across))
    top, left = min(r for r, _ in grown), min(c for _, c in grown)
    return [(r - top, c - left) for r, c in grown]


def _place(grid: Grid, cells: Sequence[Cell], colour: int, generator: np.random.Generator) -> None:
    """Draw a shape somewhere where it touches no other, not even at a corner; not at all if no place is
    found.
    """
    height, width = max(r for r, _ in cells) + 1, max(c for _, c in cells) + 1
    rows, columns = grid.shape
    if height > rows or width > columns:
        return
    for _ in range(_PLACES):
        top, left = generator.integers(rows - height + 1), generator.integers(columns - width + 1)
        if not grid[max(0, top - 1) : top + height + 1, max(0, left - 1) : left + width + 1].any():
            for r, c in cells:
                grid[top + r, left + c] = colour
            return
