from __future__ import annotations

import pytest

from manyhands.errors import MissingExtra
from manyhands.plan.compose import compose
from manyhands.plan.needs import Package, check_installed, packages_of, paths_of


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task=language_model"], []),
        (["task.text.path=a.txt"], [(("text", "path"), "a.txt")]),
        (
            ["task.weights=w"],
            [(("weights",), "w"), (("tokenizer", "path"), "w")],
        ),
        (["task=grids"], []),
        (
            [
                "task=grids",
                "task.training=arc",
                "task.evaluation=[{name: a, path: b}, {name: c, path: generated}]",
            ],
            [(("training",), "arc"), (("evaluation", 0, "path"), "b")],
        ),
        (
            ["task=tabular", "task.table.files=[a.csv,b.csv]", "task.features.statistics=s.json"],
            [
                (("table", "files", 0), "a.csv"),
                (("table", "files", 1), "b.csv"),
                (("features", "statistics"), "s.json"),
            ],
        ),
        (["task=chess_endgames", "task.syzygy=t"], [(("syzygy",), "t")]),
    ],
)
def test_paths_are_those_that_the_schema_marks(
    overrides: list[str], expected: list[tuple[object, str]]
) -> None:
    found = list(paths_of(compose(overrides).task))
    assert sorted(found, key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("overrides", "extras"),
    [
        (["task=language_model"], []),
        (["task.weights=w", "task.adapter.name=lora"], ["lora"]),
        (["task.text.kind=parquet", "task.text.path=p"], ["hub"]),
        (["task=chess_endgames"], []),
        (["task=chess_endgames", "task.pieces=KRkp", "task.syzygy=t"], []),
        (["task=chess_endgames", "task.pieces=KPkp", "task.syzygy=t"], ["chess"]),
        (["task=chess_endgames", "task.pieces='KRkp,KRPkr:2'", "task.syzygy=t"], ["chess"]),
        (["task=chess_endgames", "task.pieces=KPkp", "data.shards=s"], ["shards"]),
    ],
)
def test_packages_are_those_that_the_plan_uses(overrides: list[str], extras: list[str]) -> None:
    assert [package.extra for package in packages_of(compose(overrides))] == extras


def test_one_that_is_missing_is_named_with_what_asks_for_it() -> None:
    check_installed([Package(module="json", extra="x", option="y")])
    with pytest.raises(MissingExtra, match=r"task\.adapter needs the package 'no_such'.*manyhands\[lora\]"):
        check_installed([Package(module="no_such", extra="lora", option="task.adapter")])
