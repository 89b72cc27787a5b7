"""Errors that are known beforehand are counted, listed and drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from manyhands.plan.chess_endgames import EndgameLoss
from manyhands.tasks.chess_endgames.boards import from_fen
from manyhands.tasks.chess_endgames.evaluation import LISTED, EndgameMetrics, loss_of, move_name
from manyhands.tasks.chess_endgames.network import ILLEGAL, PLIES, Outputs
from manyhands.tasks.protocol import Batch

FENS = (
    "8/8/8/8/4k3/8/3PK3/8 w - - 0 1",
    "8/1P4k1/8/3K4/8/8/6p1/8 w - - 0 1",
    "8/8/8/8/8/1k6/1p6/1K6 w - - 0 1",
    "8/8/8/8/8/2k5/2p5/2K5 w - - 0 1",
    "8/8/8/8/8/3k4/3p4/3K4 w - - 0 1",
)
GOOD, BAD = 12 + 64 * 20, 12 + 64 * 3


def batch(truth: list[int], *, outcomes: list[list[int]] | None = None) -> Batch:
    """Two moves each, the first of them best."""
    squares, en_passant = from_fen([FENS[i % len(FENS)] for i in range(len(truth))])
    count = len(truth)
    reached = outcomes or [[value, 0] for value in truth]
    return {
        "squares": torch.from_numpy(squares),
        "en_passant": torch.from_numpy(en_passant),
        "value": torch.tensor(truth, dtype=torch.uint8),
        "dtz": torch.tensor([(value - 1) * 10 for value in truth], dtype=torch.int16),
        "moves": torch.tensor([[GOOD, BAD, -1]] * count, dtype=torch.int16),
        "outcomes": torch.tensor([[*two, 255] for two in reached], dtype=torch.uint8),
        "best": torch.tensor([[1, 0, 0]] * count, dtype=torch.uint8),
    }


def said(values: list[int], moves: list[int], *, sure: float = 3.0, plies: float = 10.0) -> Outputs:
    """What a model would say that is `sure` of these outcomes and moves."""
    count = len(values)
    policy = torch.zeros(count, 3)
    policy[:, 2] = ILLEGAL
    value = torch.zeros(count, 3)
    value[torch.arange(count), torch.tensor(values)] = sure
    policy[torch.arange(count), torch.tensor(moves)] = sure
    return Outputs(value=value, policy=policy, moves_left=torch.full((count,), plies / PLIES))


def judged(*parts: tuple[Outputs, Batch]) -> EndgameMetrics:
    metrics = EndgameMetrics(None, EndgameLoss())  # type: ignore[arg-type]
    for outputs, samples in parts:
        metrics.judge(outputs, samples)
    return metrics


def test_known_errors_are_counted() -> None:
    truth = [2, 2, 1, 0, 0]
    outputs = said([2, 1, 1, 0, 2], [0, 1, 0, 0, 1], plies=13)
    metrics = judged((outputs, batch(truth, outcomes=[[2, 0], [2, 1], [1, 0], [0, 0], [0, 0]])))
    values = metrics.values()
    assert values == {
        "value_accuracy": 3 / 5,
        "policy_accuracy": 4 / 5,  # both moves of the last two lose: either keeps the best outcome
        "moves_left_error": pytest.approx(3.0),
    }
    value, policy, worst_value, worst_policy = metrics.listings()
    assert value.rows == (
        {"truth": "loss", "loss": 1, "draw": 0, "win": 1},
        {"truth": "draw", "loss": 0, "draw": 1, "win": 0},
        {"truth": "win", "loss": 0, "draw": 1, "win": 1},
    )
    assert policy.rows[2] == {"best move": "win", "loss": 0, "draw": 1, "win": 1}
    assert [(row["fen"], row["truth"], row["model"]) for row in worst_value.rows] == [
        (FENS[1], "win", "draw"),
        (FENS[4], "loss", "win"),
    ]
    (move,) = worst_policy.rows
    assert (move["fen"], move["move"], move["truth"], move["model"]) == (FENS[1], "e2d1", "win", "draw")


def test_the_loss_has_parts_that_make_it_up() -> None:
    outputs, batch = Outputs(torch.randn(4, 3), torch.randn(4, 1858), torch.randn(4)), {
        "value": torch.tensor([0, 1, 2, 2]), "best": torch.eye(4, 1858), "dtz": torch.tensor([-4, 0, 2, 8]),
    }  # fmt: skip
    whole = loss_of(outputs, batch, EndgameLoss(value=2.0, policy=0.5, moves_left=0.0))
    assert whole.parts.keys() == {"value", "policy"}
    assert float(whole.mean) == pytest.approx(
        2 * float(whole.parts["value"]) + 0.5 * float(whole.parts["policy"])
    )


def test_the_surest_errors_are_kept() -> None:
    metrics = judged(
        *((said([0] * 4, [0] * 4, sure=sure), batch([2, 1, 2, 0])) for sure in (1.0, 5.0, 3.0, 2.0))
    )
    (worst,) = [listing for listing in metrics.listings() if listing.name == "worst of the value"]
    surest = float(torch.tensor([5.0, 0, 0]).softmax(0)[0])
    assert [(row["fen"], row["sure"]) for row in worst.rows] == [
        (fen, pytest.approx(surest, abs=1e-4)) for fen in FENS[:3]
    ], "each position once"


def test_no_more_errors_are_kept_than_are_listed() -> None:
    samples = dict(batch([2] * 12))
    samples["squares"] = samples["squares"].clone()
    samples["squares"][:, 50] = torch.arange(12, dtype=torch.uint8)
    (worst, _) = judged((said([0] * 12, [0] * 12), samples)).listings()[2:]
    assert len(worst.rows) == LISTED


def test_ranks_together_are_one() -> None:
    first, second = (said([0, 1], [0, 1]), batch([2, 1])), (said([2, 2], [0, 0], sure=4), batch([2, 0]))
    together, alone = judged(first, second), judged()
    states = [judged(first).state(), judged(second).state(), judged().state()]
    alone.merge([{name: np.array(a) for name, a in state.items()} for state in states])
    assert alone.values() == together.values()
    assert alone.listings() == together.listings()
    assert alone.picture() == together.picture()


def test_nothing_was_evaluated() -> None:
    assert judged().values() == {}
    assert judged().picture() is None


def test_the_errors_are_drawn() -> None:
    png = judged((said([0], [1]), batch([2]))).picture()
    assert png is not None
    pixels = imread(io.BytesIO(png))
    light, dark = [0xF0 / 255, 0xD9 / 255, 0xB5 / 255], [0xB5 / 255, 0x88 / 255, 0x63 / 255]
    for colour in (light, dark):
        share = np.isclose(pixels[..., :3], colour, atol=0.02).all(axis=-1).mean()
        assert share > 0.1, "half of each board, on half of the picture"


def test_the_parts_of_the_loss() -> None:
    samples, outputs = batch([2, 1]), said([2, 0], [0, 0], plies=30)
    only = {
        name: EndgameLoss(**{"value": 0, "policy": 0, "moves_left": 0, name: 2.0})
        for name in ("value", "policy")
    }
    right, wrong = (-float(torch.tensor([3.0, 0, 0]).log_softmax(0)[i]) for i in (0, 1))
    assert loss_of(outputs, samples, only["value"]).mean.item() == pytest.approx(right + wrong)
    two = -float(torch.tensor([3.0, 0]).log_softmax(0)[0])
    assert loss_of(outputs, samples, only["policy"]).mean.item() == pytest.approx(2 * two)
    left = loss_of(outputs, samples, EndgameLoss(value=0, policy=0, moves_left=1.0))
    assert left.mean.item() == pytest.approx(0.5), "20 plies off is one unit; the draw does not count"
    assert left.count == 2


def test_several_best_moves_share_the_target() -> None:
    samples = dict(batch([2]))
    samples["best"] = torch.tensor([[1, 1, 0]], dtype=torch.uint8)
    even = said([2], [0], sure=0.0)
    loss = loss_of(even, samples, EndgameLoss(value=0, policy=1, moves_left=0))
    assert loss.mean.item() == pytest.approx(np.log(2), abs=1e-6)


def test_moves_have_names() -> None:
    assert [move_name(m) for m in (12 + 64 * 28, 52 + 64 * 60 + 4096 * 4)] == ["e2e4", "e7e8q"]
