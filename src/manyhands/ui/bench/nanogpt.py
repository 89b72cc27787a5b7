"""nanoGPT's loop on a CPU, written anew from its recipe for characters of Shakespeare, to be timed beside ours.

It does what nanoGPT's train.py does there: the GPT-2 without biases, batches from memory-mapped files, AdamW as
torch chooses it on a CPU (not fused), the loss read after every iteration, 20 batches of each split evaluated every
250 iterations, and a checkpoint whenever the validation loss is the lowest yet. What it evaluates before the first
iteration is done when it is made, and not timed, as ours is not.
Source: github.com/karpathy/nanoGPT, README ("I only have a macbook") and config/train_shakespeare_char.py.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EVALUATED_EVERY = 250
_EVALUATED_BATCHES = 20


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.up_proj = nn.Linear(width, 4 * width, bias=False)
        self.down_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.attention_norm(x_BTD)).unflatten(-1, (3, self._heads, -1))
        q_BHTK, k_BHTK, v_BHTK = (part.transpose(1, 2) for part in qkv.unbind(2))
        mixed = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        x_BTD = x_BTD + self.out_proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x_BTD + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(x_BTD))))
        return out


class _Gpt(nn.Module):
    """Logits of the next token, shape (batch, block, vocabulary), from tokens of shape (batch, block)."""

    def __init__(self, vocabulary: int, block: int, *, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(block, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                last_of_block = name.endswith(("out_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if last_of_block else 0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTD = self.tokens(tokens_BT) + self.positions(torch.arange(tokens_BT.shape[1]))
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.tokens.weight)


class NanoGpt:
    """The run, in `directory`, which gets the files of tokens and the checkpoint: an iteration per learning rate.

    task: of language_model, with characters.
    """

    def __init__(self, task: Any, learning_rates: Sequence[float], *, directory: Path) -> None:
        directory.mkdir()
        torch.manual_seed(1337)
        self._files = directory / "train.bin", directory / "val.bin"
        for file, tokens in zip(self._files, (task.training, task.validation), strict=True):
            np.asarray(tokens).astype(np.uint16).tofile(file)
        self._checkpoint = directory / "ckpt.pt"
        self._block, self._batch = 64, 12
        vocabulary = int(max(task.training.max(), task.validation.max())) + 1
        self._model = _Gpt(vocabulary, self._block, layers=4, heads=4, width=128)
        decayed = [p for p in self._model.parameters() if p.ndim >= 2]
        others = [p for p in self._model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self._rates, self._done = learning_rates, 0
        self.validation_loss = float("inf")
        """The lowest yet."""
        self.training_split_s = 0.0
        """Of evaluating 20 batches of what it trains on, too; ours has the mean of the steps' own losses."""
        self._evaluate()
        self.training_split_s = 0.0

    def train(self, iterations: int) -> None:
        """Go on by so many, or to the end."""
        for _ in range(min(iterations, len(self._rates) - self._done)):
            self._iterate(self._rates[self._done])
            self._done += 1
            if self._done % EVALUATED_EVERY == 0:
                self._evaluate()

    def _iterate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        loss = self._loss(self._files[0])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        loss.item()

    def _loss(self, file: Path) -> Tensor:
        """Of a batch of random windows."""
        tokens = np.memmap(file, dtype=np.uint16, mode="r")
        starts = torch.randint(len(tokens) - self._block, (self._batch,)).tolist()
        rows = torch.stack(
            [torch.from_numpy(tokens[i : i + self._block + 1].astype(np.int64)) for i in starts]
        )
        return F.cross_entropy(self._model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    @torch.no_grad()
    def _evaluate(self) -> None:
        self._model.eval()
        begun = time.perf_counter()
        for file in self._files:
            if file is self._files[-1]:  # the validation's
                self.training_split_s += time.perf_counter() - begun
            loss = float(torch.stack([self._loss(file) for _ in range(_EVALUATED_BATCHES)]).mean())
        self._model.train()
        if loss < self.validation_loss and self._done:
            states = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
            torch.save(states, self._checkpoint)
        self.validation_loss = min(loss, self.validation_loss)
