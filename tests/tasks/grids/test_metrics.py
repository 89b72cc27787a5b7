from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from manyhands.tasks.grids.metrics import PICTURED, GridMetrics
from manyhands.tasks.grids.model import PADDING
from manyhands.tasks.grids.task import Grids

Rows = Sequence[Sequence[int]]


def padded(rows: Rows, size: int = 4) -> torch.Tensor:
    grid = torch.full((size, size), PADDING)
    grid[: len(rows), : len(rows[0])] = torch.tensor(rows)
    return grid


def batch(*samples: tuple[int, int, Rows, Rows]) -> dict[str, torch.Tensor]:
    """Of (sample, puzzle, input, truth)."""
    return {
        "sample": torch.tensor([s[0] for s in samples]),
        "puzzle": torch.tensor([s[1] for s in samples]),
        "inputs": torch.stack([padded(s[2]) for s in samples]),
        "targets": torch.stack([padded(s[3]) for s in samples]),
    }


def judged(task: Grids, *cases: tuple[int, int, Rows, Rows, Rows]) -> GridMetrics:
    """Of (sample, puzzle, input, truth, prediction), each in a batch of its own."""
    metrics = GridMetrics(task)
    for *sample, predicted in cases:
        metrics.judge(batch(tuple(sample)), padded(predicted)[None])  # type: ignore[arg-type]
    return metrics


def test_a_right_answer(task: Grids) -> None:
    values = judged(task, (0, 0, [[1, 2]], [[2, 1]], [[2, 1]])).values()
    assert values == {"pixel_accuracy": 1.0, "copy_accuracy": 0.0, "wrong_pixels": 0.0, "solved": 1.0}


def test_errors_that_cancel_out_are_errors(task: Grids) -> None:
    values = judged(task, (0, 0, [[1, 2]], [[1, 3]], [[3, 1]])).values()
    assert values == {"pixel_accuracy": 0.0, "copy_accuracy": 0.5, "wrong_pixels": 2.0, "solved": 0.0}


def test_padding_counts_for_solved_only(task: Grids) -> None:
    larger = judged(task, (0, 0, [[1, 2]], [[1, 3]], [[1, 3, 0]])).values()
    assert larger == {"pixel_accuracy": 1.0, "copy_accuracy": 0.5, "wrong_pixels": 0.0, "solved": 0.0}
    smaller = judged(task, (0, 0, [[1, 2]], [[1, 3]], [[1]])).values()
    assert smaller == {"pixel_accuracy": 0.5, "copy_accuracy": 0.5, "wrong_pixels": 1.0, "solved": 0.0}


def test_a_small_input_is_no_match_beyond_its_edge(task: Grids) -> None:
    values = judged(task, (0, 0, [[1]], [[1, 0], [0, 0]], [[1, 0], [0, 0]])).values()
    assert values["copy_accuracy"] == 0.25


def test_a_puzzle_is_solved_when_all_that_it_asks_is_right(task: Grids) -> None:
    right, wrong = [[1]], [[2]]
    metrics = judged(
        task,
        (0, 7, [[0]], right, right),
        (1, 7, [[0]], right, wrong),
        (2, 8, [[0]], right, right),
        (3, 8, [[0]], right, right),
    )
    values = metrics.values()
    assert values == {"pixel_accuracy": 0.75, "copy_accuracy": 0.0, "wrong_pixels": 0.5, "solved": 0.5}


def test_merged_states_give_what_one_process_gives(task: Grids) -> None:
    generator = np.random.default_rng(0)
    cases = [
        (sample, sample // 2, *(generator.integers(0, 3, (2, 2)).tolist() for _ in range(3)))
        for sample in range(10)
    ]
    whole = judged(task, *cases)
    # 4 and 5 are seen by both ranks, as where the last batch is filled up
    ranks = [judged(task, *cases[4:]), judged(task, *cases[:6])]
    states = [rank.state() for rank in ranks]
    for rank in ranks:
        rank.merge(states)
        assert rank.values() == whole.values()
        assert rank.picture() == whole.picture()
    assert 0 < whole.values()["pixel_accuracy"] < 1


def test_a_rank_without_samples(task: Grids) -> None:
    some, none = judged(task, (0, 0, [[1]], [[1]], [[1]])), GridMetrics(task)
    assert (none.values(), none.picture()) == ({}, None)
    expected = some.values()
    none.merge([none.state(), some.state()])
    assert none.values() == expected
    assert none.picture() == some.picture()


def test_the_picture_shows_the_first_samples(task: Grids) -> None:
    metrics = judged(task, *((i, i, [[1]], [[2]], [[3]]) for i in reversed(range(PICTURED + 4))))
    state = metrics.state()
    assert sorted(state["pictured"]) == list(range(PICTURED))
    assert [int(grid[0, 0]) for grid in state["pictures"][0]] == [1, 2, 3]
    assert all(array.dtype != object for array in state.values())


def test_predictions_are_the_likeliest_classes_of_the_model(task: Grids) -> None:
    class Always4(torch.nn.Module):
        def forward(self, inputs: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.full_like(inputs, 4), 11) * 9.0

    split = task.evaluation_sets[0]
    given = task.batch(np.arange(task.samples(split)), split)
    metrics = task.metrics(split)
    loss = metrics.add(Always4(), given)
    assert loss.mean == task.loss(Always4(), given).mean
    inside = given["targets"] != PADDING
    share = (given["targets"] == 4).sum() / inside.sum()
    assert metrics.values()["pixel_accuracy"] == pytest.approx(share.item())
