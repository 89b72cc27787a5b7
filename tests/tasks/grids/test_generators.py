from __future__ import annotations

import itertools

import numpy as np
import pytest

from manyhands.errors import DataError
from manyhands.plan.tasks import GeneratedGrids
from manyhands.tasks.grids.generators import apply_all, fault_of, generate, polyomino
from manyhands.tasks.grids.puzzles import Pair, Puzzle
from manyhands.tasks.grids.rules import Grid, Rule, shapes_of

SETTINGS = GeneratedGrids()


def bytes_of(puzzle: Puzzle) -> list[tuple[tuple[int, ...], bytes]]:
    return [(grid.shape, grid.tobytes()) for pair in puzzle.pairs for grid in pair]


def test_a_puzzle_depends_on_seed_set_and_number_alone() -> None:
    first = generate(SETTINGS, 10, 1, 0, 5)
    for other in [(1, 0, 4), (2, 0, 5), (1, 1, 5)]:
        assert bytes_of(generate(SETTINGS, 10, *other)) != bytes_of(first)
    again = generate(SETTINGS, 10, 1, 0, 5)
    assert bytes_of(again) == bytes_of(first)
    assert again.origin == first.origin


@pytest.mark.parametrize("size", [6, 10, 30])
def test_no_puzzle_is_trivial(size: int) -> None:
    families = set()
    for index in range(40):
        puzzle = generate(SETTINGS, size, 3, 0, index)
        assert (len(puzzle.pairs), puzzle.tests) == (4, 1)
        rules = [Rule(r["family"], r["choice"], r.get("colour", 0)) for r in puzzle.origin["rules"]]
        families.add(tuple(rule.family for rule in rules))
        assert puzzle.origin["seed"] == [3, 0, index]
        for scene, answer in puzzle.pairs:
            assert not np.array_equal(scene, answer)
            assert max(*scene.shape, *answer.shape) <= size
            assert len(np.unique(answer)) > 1
            assert np.array_equal(apply_all(rules, scene), answer), "the origin tells the rule"
            assert answer.max() <= 9
        for (_, one), (_, other) in itertools.combinations(puzzle.pairs, 2):
            assert not np.array_equal(one, other)
    assert {len(names) for names in families} == {1, 2}


def grid(text: str) -> Grid:
    return np.array([[int(c) for c in row.replace(".", "0")] for row in text.split()], dtype=np.uint8)


def pairs(rules: list[Rule], *scenes: str) -> list[Pair]:
    return [(grid(scene), apply_all(rules, grid(scene))) for scene in scenes]


def test_what_makes_no_puzzle_is_named() -> None:
    down, keep = Rule("falling", "down"), Rule("filter", "keep_colour", 2)
    good = ["12. ...", "2.1 ...", "..2 1.."]
    assert fault_of(pairs([down], "12. ...", "2.1 ..."), [down]) is None
    assert fault_of(pairs([down], "12. ...", "... 12."), [down]) == "unchanged"
    assert fault_of(pairs([keep], "1.. ...", *good), [keep]) == "blank"
    assert fault_of(pairs([keep], "2.1 ...", "2.. 1.."), [keep]) == "alike"
    # the first rule alone changes nothing that is seen afterwards
    both = [Rule("filter", "remove_colour", 1), keep]
    assert fault_of(pairs(both, "12. 3.."), both) == "covered"
    # in all but one pair, colour 1 is the only one to go: removing it or keeping 2 is the same there
    assert fault_of(pairs([keep], "12. ...", "..2 .1.", "13. 2.."), [keep]) == "hidden"
    assert fault_of(pairs([keep], "123 ...", "..2 31.", "13. 2.."), [keep]) is None


def test_a_composition_that_undoes_itself_is_refused() -> None:
    twice = [Rule("mirror", "left_right"), Rule("mirror", "left_right")]
    assert fault_of(pairs(twice, "12. ..."), twice) == "unchanged"


def test_tries_are_bounded_and_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyhands.tasks.grids.generators.TRIES", 2)
    monkeypatch.setattr(
        "manyhands.tasks.grids.generators._scene", lambda _rules, shape, _g: np.zeros(shape, np.uint8)
    )
    with pytest.raises(DataError, match=r"number 9 .* in 2 tries .*unchanged 96.*raise task\.size"):
        generate(SETTINGS, 6, 1, 0, 9)


def test_rejections_are_counted() -> None:
    origins = [generate(SETTINGS, 6, 1, 0, index).origin for index in range(30)]
    assert sum(sum(origin["rejected"].values()) for origin in origins) > 0
    assert any(origin["tries"] > 1 or origin["rejected"] for origin in origins)


def test_polyominoes_are_connected_and_of_the_size_asked_for() -> None:
    generator = np.random.default_rng(0)
    seen = set()
    for _ in range(60):
        cells = polyomino(4, generator)
        canvas = np.zeros((4, 4), dtype=np.uint8)
        for r, c in cells:
            canvas[r, c] = 1
        assert [len(shape.cells) for shape in shapes_of(canvas)] == [4]
        assert (min(r for r, _ in cells), min(c for _, c in cells)) == (0, 0)
        seen.add(canvas.tobytes())
    assert len(seen) > 10  # of 19 fixed tetrominoes
