"""Shapes, masks and symmetries of the endgame transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manyhands.tasks.chess_endgames.boards import from_fen
from manyhands.tasks.chess_endgames.network import EndgameTransformer, Outputs

RACE = "8/1P4k1/8/3K4/8/8/6p1/8 w - - 0 1"
RACE_MIRRORED = "8/1k4P1/8/4K3/8/8/1p6/8 w - - 0 1"
FEW = "8/8/8/8/4k3/8/3PK3/8 w - - 0 1"
EN_PASSANT = "8/8/8/2Pp4/8/k7/8/2K5 w - d6 0 1"
PUSH, PROMOTE_KNIGHT, PROMOTE_QUEEN = 35 + 64 * 43, 49 + 64 * 57 + 4096, 49 + 64 * 57 + 4096 * 4
MOVES = (PUSH, PROMOTE_KNIGHT, PROMOTE_QUEEN, -1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def network(**changed: Any) -> EndgameTransformer:
    """Its weights are large enough that everything matters."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "width": 16, "layers": 2, "heads": 2, "feed_forward": 2.0, "norm": "layer", "activation": "gelu", "pieces": 4
    }  # fmt: skip
    model = EndgameTransformer(**{**sizes, **changed}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def outputs(model: EndgameTransformer, *fens: str, moves: tuple[int, ...] = MOVES) -> Outputs:
    squares, en_passant = from_fen(fens)
    chosen = torch.tensor([moves] * len(fens), dtype=torch.int16)
    with torch.no_grad():
        return model(torch.from_numpy(squares), torch.from_numpy(en_passant), chosen)


@pytest.mark.parametrize("pieces", [None, 4])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "squared_relu"])
def test_shapes(pieces: int | None, norm: str, activation: str) -> None:
    out = outputs(network(pieces=pieces, norm=norm, activation=activation), RACE, FEW)
    assert [tuple(part.shape) for part in out] == [(2, 3), (2, 4), (2,)]
    assert all(part.isfinite().all() for part in out)


@pytest.mark.parametrize("pieces", [None, 4])
def test_computes_in_bf16(pieces: int | None) -> None:
    exact = outputs(network(pieces=pieces), RACE, FEW, moves=MOVES[:3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = outputs(network(pieces=pieces), RACE, FEW, moves=MOVES[:3])
    pure = outputs(network(pieces=pieces).bfloat16(), RACE, FEW, moves=MOVES[:3])
    for wanted, *rounded in zip(exact, mixed, pure, strict=True):
        for got in rounded:
            torch.testing.assert_close(got.float(), wanted, rtol=0.0, atol=0.1 * float(wanted.abs().max()))


@pytest.mark.parametrize("half", [False, True])
def test_what_is_no_move_has_no_probability(half: bool) -> None:
    model = network().half() if half else network()
    probability = outputs(model, RACE).policy.softmax(dim=1)
    assert probability[0, 3] == 0
    assert (probability[0, :3] > 0).all()


def test_moves_that_differ_have_logits_that_differ() -> None:
    assert outputs(network(), RACE).policy[0, :3].unique().numel() == 3


@pytest.mark.parametrize("pieces", [None, 4])
def test_a_mirror_image_is_the_same_position(pieces: int | None) -> None:
    mirrored = tuple(
        m if m < 0 else (m % 64 ^ 7) + 64 * (m // 64 % 64 ^ 7) + 4096 * (m // 4096) for m in MOVES
    )
    model = network(pieces=pieces)
    for one, other in zip(outputs(model, RACE), outputs(model, RACE_MIRRORED, moves=mirrored), strict=True):
        torch.testing.assert_close(one, other)


def test_what_fills_up_says_nothing() -> None:
    """A position of three pieces among four or six tokens."""
    for one, other in zip(
        outputs(network(pieces=3), FEW, moves=(11 + 64 * 19,)),
        outputs(network(pieces=6), FEW, moves=(11 + 64 * 19,)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("pieces", [None, 4])
def test_en_passant_is_seen(pieces: int | None) -> None:
    model = network(pieces=pieces)
    with_it, without = (
        outputs(model, EN_PASSANT.replace("d6", square), moves=(34 + 64 * 42,)) for square in ("d6", "-")
    )
    assert not torch.allclose(with_it.value, without.value)


def test_pieces_are_seen_each_by_itself() -> None:
    """Exchanging a rook and a pawn of the same side is another position."""
    model = network()
    value = outputs(model, "8/8/1k6/8/8/2R2P2/8/6K1 w - - 0 1", "8/8/1k6/8/8/2P2R2/8/6K1 w - - 0 1").value
    assert not torch.allclose(value[0], value[1])


def test_compiles_as_one_graph() -> None:
    model, (squares, en_passant) = network(), from_fen([RACE, FEW])
    given = torch.from_numpy(squares), torch.from_numpy(en_passant), torch.tensor([MOVES, MOVES])
    explained = torch._dynamo.explain(model)(*given)
    assert explained.graph_break_count == 0
