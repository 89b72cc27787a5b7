"""The endgame transformer: a token for each square of the board, and heads for value, policy and moves left.

A pre-norm transformer (Xiong et al., 2002.04745). A token is the sum of three learned embeddings: of what stands on
its square, of the square, and of the two together. Each head adds to its attention a learned bias for the offset of
two squares, so that lines and knights' jumps need not be found pair by pair.

Two things hold exactly, by construction:
- a position and its mirror image (files a and h exchanged) get the same outputs: with the mover's king on files e to
  h everything is seen in the mirror. Without castling, as here, chess itself has this symmetry;
- with `pieces` only occupied squares are tokens: empty ones neither look nor are looked at. The parameters are the
  same, the network is another; with four pieces it costs a tenth.

The policy comes from the token of the piece that moves: a logit for each square that it may go to and for each
promotion. Those of `moves`, the legal ones, are chosen from these, so an illegal move has no probability.

No dropout and no buffers. Projections are separate nn.Linear with the number of heads left to reshape, so rows and
columns of them can lie on several devices.

Shapes: B positions, T tokens (64, or pieces), D width, H heads, M moves, K targets of a piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

SQUARES: Final = 64
KINDS: Final = 14
"""What a token is: 0 empty, 1-6 the mover's P N B R Q K, 7-12 the opponent's, 13 an opponent's pawn that may be taken
en passant."""
TARGETS: Final = 96
"""Where a piece may go: 64 squares; 8 files of the last rank for each promotion to N B R Q."""
ILLEGAL: Final = -1e4
"""The logit of no move: its probability is exactly 0, in half precision too."""

_MY_KING, _THEIR_PAWN, _THEIR_MARKED_PAWN = 6, 7, 13
_PIECE_KINDS: Final = 13  # without the mark
_OFFSETS: Final = 15**2  # files and ranks between two squares: -7 to 7 each
NOT_SEEN: Final = _OFFSETS
_SPREAD: Final = 0.02  # standard deviation of first weights, as in GPT-2

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "relu", "squared_relu"]

_ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),  # So et al., 2109.08668
}
_NORMS: Final[dict[str, Callable[[int], nn.Module]]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class Outputs(NamedTuple):
    """`value` [B, 3]: logits of loss, draw, win. `policy` [B, M]: logits in the order of `moves`, ILLEGAL for no
    move. `moves_left` [B]: plies to the next capture or pawn move if the position is decided, in units of PLIES.
    """

    value: torch.Tensor
    policy: torch.Tensor
    moves_left: torch.Tensor


PLIES: Final = 20.0


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.offset_bias = nn.Linear(_OFFSETS, heads, bias=False)  # a table, as a layer that can be divided

    def forward(self, x_BTD: torch.Tensor, offsets_BTT: torch.Tensor) -> torch.Tensor:
        """`offsets_BTT`: 0 to 224 by offset of two tokens' squares; NOT_SEEN for a token that only fills up."""
        every = torch.eye(_OFFSETS, device=x_BTD.device, dtype=x_BTD.dtype)
        table = F.pad(self.offset_bias(every), (0, 0, 0, 1), value=ILLEGAL)  # [226, H]
        bias_BHTT = F.embedding(offsets_BTT, table).movedim(-1, 1)
        q, k, v = (
            projection(x_BTD).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, H, T, D/H]
        scores = (
            q @ k.transpose(2, 3) * self.head_width**-0.5 + bias_BHTT
        )  # a bias that learns rules out fused ones
        out: torch.Tensor = self.o_proj((scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, activation: Activation) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden)
        self.down_proj = nn.Linear(hidden, width)
        self.activation = activation

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(_ACTIVATIONS[self.activation](self.up_proj(x_BTD)))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, norm: Norm, activation: Activation) -> None:
        super().__init__()
        self.attention_norm = _NORMS[norm](width)
        self.attention = Attention(width, heads)
        self.mlp_norm = _NORMS[norm](width)
        self.mlp = FeedForward(width, hidden, activation)

    def forward(self, x_BTD: torch.Tensor, offsets_BTT: torch.Tensor) -> torch.Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), offsets_BTT)
        out: torch.Tensor = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return out


class EndgameTransformer(nn.Module):
    """From a position and its legal moves to value, policy and moves left.

    `pieces`: None, a token for each square; or the largest number of pieces on a board, and only occupied squares are
    tokens.
    """

    tp_plan: ClassVar[dict[str, str]] = {
        **{f"layers.*.attention.{name}": "colwise" for name in ("q_proj", "k_proj", "v_proj", "offset_bias")},
        "layers.*.attention.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    """How tensor ranks divide it (engine/parallel.py)."""
    not_hidden: ClassVar[tuple[str, ...]] = ("policy_head", "value_head", "moves_left_head", "offset_bias")
    """Layers that Muon leaves to AdamW (engine/optimizer.py)."""

    def __init__(
        self,
        *,
        width: int,
        layers: int,
        heads: int,
        feed_forward: float,
        norm: Norm,
        activation: Activation,
        pieces: int | None,
    ) -> None:
        super().__init__()
        self.heads, self.pieces = heads, pieces
        hidden = max(1, round(feed_forward * width))
        self.kind_embedding = nn.Embedding(KINDS, width)
        self.square_embedding = nn.Embedding(SQUARES, width)
        self.kind_on_square_embedding = nn.Embedding(KINDS * SQUARES, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, norm, activation) for _ in range(layers))
        self.last_norm = _NORMS[norm](width)
        self.policy_head = nn.Linear(width, TARGETS)
        self.value_hidden = nn.Linear((_PIECE_KINDS - 1) * width, 2 * width)
        self.value_head = nn.Linear(2 * width, 3)
        self.moves_left_head = nn.Linear(2 * width, 1)
        self._first_weights(residual_additions=2 * layers)

    def forward(self, squares: torch.Tensor, en_passant: torch.Tensor, moves: torch.Tensor) -> Outputs:
        """Of integer `squares` [B, 64], `en_passant` [B] and `moves` [B, M], as records have them (truth.py)."""
        squares = squares.long()
        kinds_BT, places_BT, slots_B64 = self._tokens(squares, en_passant.long())
        mirrored = ((squares == _MY_KING).int().argmax(dim=1, keepdim=True) % 8 >= 4).long()
        places_BT = _mirrored(places_BT, mirrored)
        x_BTD = (
            self.kind_embedding(kinds_BT)
            + self.square_embedding(places_BT)
            + self.kind_on_square_embedding(kinds_BT * SQUARES + places_BT)
        )
        offsets_BTT = _offsets(places_BT)
        if self.pieces is not None:
            offsets_BTT = torch.where((kinds_BT == 0).unsqueeze(1), NOT_SEEN, offsets_BTT)
        for layer in self.layers:
            x_BTD = layer(x_BTD, offsets_BTT)
        x_BTD = self.last_norm(x_BTD)
        hidden = F.gelu(self.value_hidden(_by_piece(x_BTD, kinds_BT)))
        return Outputs(
            value=self.value_head(hidden),
            policy=_of_moves(self.policy_head(x_BTD), moves.long(), slots_B64, mirrored),
            moves_left=self.moves_left_head(hidden).squeeze(-1),
        )

    def _tokens(
        self, squares: torch.Tensor, en_passant: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Kinds and squares [B, T] of the tokens, and the token of each square [B, 64]."""
        places = torch.arange(SQUARES, device=squares.device).expand_as(squares)
        pushed = (en_passant - 8).unsqueeze(1)  # the pawn stands one rank before the square that it passed
        kinds = torch.where((places == pushed) & (en_passant >= 0).unsqueeze(1), _THEIR_MARKED_PAWN, squares)
        if self.pieces is None:
            return kinds, places, places
        occupied = (squares != 0).long()
        first = (occupied * SQUARES + SQUARES - 1 - places).topk(self.pieces, dim=1).values
        taken = SQUARES - 1 - first % SQUARES  # occupied squares, ascending; empty ones where these are fewer
        return kinds.gather(1, taken), taken, (occupied.cumsum(dim=1) - 1).clamp(0, self.pieces - 1)

    def _first_weights(self, residual_additions: int) -> None:
        """Normal with a small spread; what is added to the residual stream smaller still, as in GPT-2."""
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue  # ones and zeros
            if parameter.ndim < 2 or name.endswith("offset_bias.weight"):
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=_SPREAD / residual_additions**0.5)
            else:
                nn.init.normal_(parameter, std=_SPREAD)


def _offsets(places_BT: torch.Tensor) -> torch.Tensor:
    ranks, files = places_BT // 8, places_BT % 8
    ranks = ranks.unsqueeze(2) - ranks.unsqueeze(1) + 7
    return ranks * 15 + files.unsqueeze(2) - files.unsqueeze(1) + 7


def _by_piece(x_BTD: torch.Tensor, kinds_BT: torch.Tensor) -> torch.Tensor:
    """[B, 12 * D]: for each kind of piece the sum of its tokens, so that the value knows which piece says what. With
    a mean over all tokens, four wrong values of a hundred more were left after 300,000 positions of KPkp.
    """
    kinds_BT = torch.where(kinds_BT == _THEIR_MARKED_PAWN, _THEIR_PAWN, kinds_BT)
    sums = F.one_hot(kinds_BT, _PIECE_KINDS).to(x_BTD.dtype).transpose(1, 2) @ x_BTD  # [B, 13, D]
    return sums[:, 1:].flatten(1)


def _mirrored(squares: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """`squares` [B, N] with files exchanged in the rows where `mirrored` [B, 1] is 1."""
    return squares + mirrored * (7 - 2 * (squares % 8))


def _of_moves(
    targets_BTK: torch.Tensor, moves: torch.Tensor, slots_B64: torch.Tensor, mirrored: torch.Tensor
) -> torch.Tensor:
    """Logits [B, M] of `moves` (-1: none) among those of each token's targets."""
    there, moves = moves >= 0, moves.clamp(min=0)
    slots = slots_B64.gather(1, moves % 64)
    to = _mirrored(moves // 64 % 64, mirrored)
    promotion = moves // 4096
    target = torch.where(promotion > 0, SQUARES + 8 * (promotion - 1) + to % 8, to)
    logits = targets_BTK.flatten(1).gather(1, slots * TARGETS + target)
    return torch.where(there, logits, torch.full_like(logits, ILLEGAL))
