"""The pixel transformer: context pairs are encoded, the pixels of the test input ask what they become.

A pre-norm encoder-decoder (Vaswani et al., 1706.03762; pre-norm: Xiong et al., 2002.04745) on padded grids.
The pixels of a context pair at one place are one token, the sum of what is there in the input and in the
output, each embedded by its role, and of learned embeddings of row and column: the sequence is half as long
as with a token for each, and what a pixel becomes is visible in one place. Pairs are encoded one by one with
the same weights; each pixel of the test input then looks at the other pixels of its grid and at all pixels of
all pairs. Pairs have no number: their order changes nothing.

No dropout and no buffers. Projections are separate nn.Linear with the number of heads left to reshape, so
rows and columns of them can lie on several devices.

Shapes: B samples, C context pairs, S rows and columns, P = S * S pixels, D width, H heads, K classes.
"""

from __future__ import annotations

from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import nn

PADDING: Final = 10
"""The class of pixels outside a grid; 0 to 9 are colours."""
CLASSES: Final = 11

_SPREAD: Final = 0.02  # standard deviation of first weights, as in GPT-2


class Attention(nn.Module):
    """Multi-head attention of one sequence to another, or to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, x_BPD: torch.Tensor, seen_BLD: torch.Tensor, mask_B11L: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, P, D]; `mask_B11L`: bool, true for what may be looked at."""
        q, k, v = self.q_proj(x_BPD), self.k_proj(seen_BLD), self.v_proj(seen_BLD)
        q, k, v = (
            t.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for t in (q, k, v)
        )  # [B, H, P, D/H]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B11L)
        out: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, 4 * width)
        self.down_proj = nn.Linear(4 * width, width)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(F.gelu(self.up_proj(x_BPD)))
        return out


class EncoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(self, x_BPD: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(x_BPD)
        x_BPD = x_BPD + self.attention(normed, normed)
        out: torch.Tensor = x_BPD + self.mlp(self.mlp_norm(x_BPD))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.cross_attention_norm = nn.LayerNorm(width)
        self.cross_attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width)

    def forward(
        self, x_BPD: torch.Tensor, context_BLD: torch.Tensor, mask_B11L: torch.Tensor
    ) -> torch.Tensor:
        normed = self.attention_norm(x_BPD)
        x_BPD = x_BPD + self.attention(normed, normed)
        x_BPD = x_BPD + self.cross_attention(self.cross_attention_norm(x_BPD), context_BLD, mask_B11L)
        out: torch.Tensor = x_BPD + self.mlp(self.mlp_norm(x_BPD))
        return out


class PixelTransformer(nn.Module):
    """From context pairs and a test input to logits for each pixel of the test output."""

    tp_plan: ClassVar[dict[str, str]] = {
        f"{layers}.*.{module}": way
        for layers in ("encoder", "decoder")
        for modules, way in (
            (("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.up_proj"), "colwise"),
            (("cross_attention.q_proj", "cross_attention.k_proj", "cross_attention.v_proj"), "colwise"),
            (("attention.o_proj", "cross_attention.o_proj", "mlp.down_proj"), "rowwise"),
        )
        for module in modules
    }
    """How tensor ranks divide it (engine/parallel.py)."""

    def __init__(
        self, *, size: int, width: int, heads: int, encoder_layers: int, decoder_layers: int
    ) -> None:
        super().__init__()
        self.size, self.heads = size, heads
        self.input_embedding = nn.Embedding(CLASSES, width)  # by role: what is in an input ...
        self.output_embedding = nn.Embedding(CLASSES, width)  # ... and in an output
        self.row_embedding = nn.Embedding(size, width)
        self.column_embedding = nn.Embedding(size, width)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads) for _ in range(encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, heads) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)
        self._first_weights(residual_additions=2 * encoder_layers + 3 * decoder_layers)

    def forward(
        self,
        inputs: torch.Tensor,
        context_inputs: torch.Tensor,
        context_outputs: torch.Tensor,
        context_mask: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [B, S, S, K] from int64 grids [B, S, S] and [B, C, S, S]; `context_mask`: bool [B, C], false
        for pairs that are not there.
        """
        batch, pairs = context_mask.shape
        places_SSD = self.row_embedding.weight[:, None] + self.column_embedding.weight
        context = self.input_embedding(context_inputs) + self.output_embedding(context_outputs) + places_SSD
        context = context.flatten(0, 1).flatten(1, 2)  # [B * C, P, D]
        for layer in self.encoder:
            context = layer(context)
        context = self.encoder_norm(context).view(batch, pairs * self.size**2, -1)  # [B, C * P, D]
        mask = context_mask.repeat_interleave(self.size**2, dim=1)[:, None, None]  # [B, 1, 1, C * P]
        x = (self.input_embedding(inputs) + places_SSD).flatten(1, 2)  # [B, P, D]
        for layer in self.decoder:
            x = layer(x, context, mask)
        logits: torch.Tensor = self.head(self.decoder_norm(x))  # [B, P, K]
        return logits.view(batch, self.size, self.size, -1)

    def _first_weights(self, residual_additions: int) -> None:
        """Normal with a small spread; what is added to the residual stream smaller still, as in GPT-2. A head
        of zeros learned filters several hundred steps later.
        """
        for name, parameter in self.named_parameters():
            if "norm" in name:
                continue  # ones and zeros
            if parameter.ndim < 2:
                nn.init.zeros_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=_SPREAD / residual_additions**0.5)
            else:
                nn.init.normal_(parameter, std=_SPREAD)
