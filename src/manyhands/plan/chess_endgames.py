"""What a plan says about the task on chess endgames: which positions, where their truth comes from, the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from manyhands.config import LocalPath, Settings
from manyhands.plan.fine_tuning import FineTuned

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class EndgameModel(Settings):
    """The endgame transformer: from squares to value, policy and moves left."""

    width: Count = 64
    """Width of its layers."""
    layers: Count = 4
    """Layers of attention and feed-forward."""
    heads: Count = 4
    """Heads of attention; they divide the width."""
    tokens: Literal["squares", "pieces"] = "squares"
    """squares: a token for each of the 64; pieces: for occupied ones only, which with a few pieces is many times
    faster, by the same parameters."""
    norm: Literal["layer", "rms"] = "layer"
    """Normalization before each part of a layer: by mean and variance, or by the root of the mean square."""
    feed_forward: Annotated[float, Field(gt=0)] = 2.0
    """Width of the feed-forward parts, as a multiple of the width."""
    activation: Literal["gelu", "relu", "squared_relu"] = "squared_relu"
    """Between the two matrices of a feed-forward part."""


class EndgameLoss(Settings):
    """Weights of the parts of the loss; a part of weight 0 is not learned."""

    value: Weight = 1.0
    """Cross-entropy of loss, draw and win."""
    policy: Weight = 1.0
    """Cross-entropy of the legal moves; all moves that are best share the target."""
    moves_left: Weight = 0.1
    """Huber loss of the plies to the next capture or pawn move of positions that are won or lost."""


class ChessEndgamesTask(FineTuned):
    """Chess endgames with exact truth: random positions with given pieces, from Syzygy tables, or solved here where
    three pieces are on the board."""

    name: Literal["chess_endgames"] = "chess_endgames"
    """chess_endgames: positions with few pieces, with exact truth."""
    pieces: Annotated[str, Field(min_length=1)] = "KPk"
    """White's pieces in capitals, then Black's: KPkp is king and pawn against king and pawn. Several by commas, with
    weights after a colon: KPkp:2,KRkp,krKP."""
    syzygy: LocalPath | None = None
    """Directory of Syzygy tables (.rtbw and .rtbz); null: solve endings of three pieces here."""
    positions: Count = 1_000_000
    """Positions of an epoch, each drawn by the plan's seed and its number."""
    validation_positions: Count = 100_000
    """Positions to evaluate on. None of them, nor the mirror image of one, is ever trained on."""
    held_out: Annotated[float, Field(ge=0.01, le=0.99)] = 0.125
    """Share of all positions that are kept for validation: by a hash of the position, whatever the seed."""
    model: EndgameModel = EndgameModel()
    """Size of the model."""
    loss: EndgameLoss = EndgameLoss()
    """What the loss weighs."""
