from __future__ import annotations

import numpy as np
import pytest

from manyhands.plan.tasks import GeneratedGrids
from manyhands.tasks.grids.rules import FAMILIES, Grid, Rule, rules_of, shapes_of


def grid(text: str) -> Grid:
    """Rows separated by blanks, a dot for the background."""
    return np.array([[int(c) for c in row.replace(".", "0")] for row in text.split()], dtype=np.uint8)


CASES = [
    # an L comes to lie on a single cell
    (Rule("falling", "down"), "22..1 2.... .3... .....", "..... ..... 22... 23..1"),
    (Rule("falling", "up"), "..... .3... 2...4", "23..4 ..... ....."),
    (Rule("falling", "left"), "..1.2 ...33", "12... 33..."),
    (Rule("falling", "right"), "1.2.. .....", "...12 ....."),
    # beside, above and below are attracted, a shape off both axes is not; other colours hold
    (
        Rule("gravity", "block", 5),
        "..1.... ....... 2.55..3 ..55... ....... ..4...6",
        "....... ..1.... .2553.. ..55... ..4.... ......6",
    ),
    (Rule("gravity", "block", 5), "1.2.5", "..125"),
    (Rule("gravity", "block", 9), "1.2.5", "1.2.5"),
    (Rule("lines", "horizontal", 3), "..... .3.2. .....", "..... 3332. ....."),
    (Rule("lines", "vertical", 3), "..... .3.2. .2...", ".3... .3.2. .2..."),
    (Rule("lines", "cross", 3), "... .3. ...", ".3. 333 .3."),
    (Rule("lines", "diagonal", 3), "... .3. ..1", "3.3 .3. 3.1"),
    (Rule("lines", "cross", 3), "33. ...", "33. ..."),  # no single cell
    (Rule("mirror", "left_right"), "12. 3..", ".21 ..3"),
    (Rule("mirror", "up_down"), "12. 3..", "3.. 12."),
    (Rule("mirror", "transpose"), "12. 3..", "13 2. .."),
    (Rule("mirror", "half_turn"), "12. 3..", "..3 .21"),
    (Rule("mirror", "complete_left_right"), "12.. 3...", "1221 3..3"),
    (Rule("mirror", "complete_up_down"), "12. ... ...", "12. ... 12."),
    (Rule("filter", "keep_colour", 2), "22.1 3.2.", "22.. ..2."),
    (Rule("filter", "remove_colour", 2), "22.1 3.2.", "...1 3..."),
    (Rule("filter", "keep_largest"), "22.1 3.11 3..1", "...1 ..11 ...1"),
    (Rule("filter", "remove_largest"), "22.1 3.2. 3...", "...1 ..2. ...."),  # two of two cells
]


@pytest.mark.parametrize(("rule", "before", "after"), CASES)
def test_rule(rule: Rule, before: str, after: str) -> None:
    scene = grid(before)
    made = rule(scene)
    assert made.tolist() == grid(after).tolist()
    assert made.dtype == np.uint8
    assert scene.tolist() == grid(before).tolist(), "the input is left alone"


def test_every_choice_of_every_family_has_a_case() -> None:
    every = {(rule.family, rule.choice) for family in FAMILIES for rule in rules_of(family)}
    assert every == {(rule.family, rule.choice) for rule, _, _ in CASES}
    assert set(FAMILIES) == set(GeneratedGrids().rules)


def test_an_interlocked_pair_falls_together() -> None:
    """Neither can fall before the other has: both end on the ground."""
    scene = grid("11.. 1.2. 1.2. 122. .... ....")
    fallen = Rule("falling", "down")(scene)
    assert fallen.tolist() == grid(".... .... 11.. 1.2. 1.2. 122.").tolist()


def test_shapes_touch_along_edges_and_have_one_colour() -> None:
    shapes = shapes_of(grid("1.22 .1.2 11.3"))
    assert [(s.colour, len(s.cells)) for s in shapes] == [(1, 1), (2, 3), (1, 3), (3, 1)]


def test_rules_take_any_grid() -> None:
    generator = np.random.default_rng(1)
    for family in FAMILIES:
        for rule in rules_of(family):
            for shape in ((1, 1), (1, 6), (5, 4)):
                assert rule(generator.integers(0, 10, shape, dtype=np.uint8)).size == np.prod(shape)
