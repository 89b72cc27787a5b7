"""What an evaluation of grids measures beside the loss.

    pixel_accuracy   share of the pixels of true outputs that are predicted; padding is left out
    copy_accuracy    the same for whoever answers with the input: what a model has to beat
    wrong_pixels     per puzzle: pixels of its true outputs that are predicted wrongly; padding is left out
    solved           share of puzzles of which every pixel of every output asked is right, and so its size:
                     here padding counts, and grids are compared pixel by pixel

Figures are sums of integers, kept by sample: they do not depend on how samples were spread over batches and
ranks, and a sample that two ranks have seen counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from manyhands.tasks.grids.model import PADDING
from manyhands.tasks.grids.picture import draw
from manyhands.tasks.protocol import Batch, Loss, Metrics, Task

PICTURED: Final = 6
"""Samples in a picture: those with the smallest numbers."""

TALLIES: Final = ("sample", "puzzle", "pixels", "wrong", "copied", "missed")
"""Columns of the state, int64. missed: wrong pixels, those outside the true output among them."""


class GridMetrics(Metrics):
    """Tallies and some pictures of one evaluation."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._tallies: list[npt.NDArray[np.int64]] = []  # each [n, len(TALLIES)]
        self._pictures: dict[int, npt.NDArray[np.uint8]] = {}  # sample -> [3, S, S]: input, truth, prediction

    def add(self, model: torch.nn.Module, batch: Batch) -> Loss:
        logits = logits_of(model, batch)
        self.judge(batch, logits.argmax(-1))
        return loss_of(logits, batch)

    def judge(self, batch: Batch, predicted: torch.Tensor) -> None:
        """Tally the predictions [B, S, S] of a batch, classes 0 to 10."""
        inputs, truth = batch["inputs"], batch["targets"]
        inside, wrong = truth != PADDING, truth != predicted
        columns = (
            batch["sample"],
            batch["puzzle"],
            inside.sum((1, 2)),
            (wrong & inside).sum((1, 2)),
            ((inputs == truth) & inside).sum((1, 2)),
            wrong.sum((1, 2)),
        )
        self._tallies.append(torch.stack(columns, dim=1).cpu().numpy())
        shown = torch.stack((inputs, truth, predicted), dim=1)[:PICTURED].to(torch.uint8).cpu().numpy()
        self._keep_pictures(batch["sample"][:PICTURED].tolist(), shown)

    def state(self) -> dict[str, np.ndarray]:
        return {
            "tallies": self._table(),
            "pictured": np.array(list(self._pictures), dtype=np.int64),
            "pictures": np.stack(list(self._pictures.values())) if self._pictures else _NO_PICTURES,
        }

    def merge(self, states: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._tallies = [state["tallies"] for state in states]
        self._pictures = {}
        for state in states:
            self._keep_pictures(state["pictured"].tolist(), state["pictures"])

    def values(self) -> dict[str, float]:
        table = self._table()
        _, first = np.unique(table[:, 0], return_index=True)  # each sample once
        if not len(first):
            return {}
        _, puzzle, pixels, wrong, copied, missed = table[first].T
        puzzles, place = np.unique(puzzle, return_inverse=True)
        missed_by_puzzle = np.zeros(len(puzzles), dtype=np.int64)
        np.add.at(missed_by_puzzle, place, missed)
        return {
            "pixel_accuracy": 1.0 - int(wrong.sum()) / int(pixels.sum()),
            "copy_accuracy": int(copied.sum()) / int(pixels.sum()),
            "wrong_pixels": int(wrong.sum()) / len(puzzles),
            "solved": int((missed_by_puzzle == 0).sum()) / len(puzzles),
        }

    def picture(self) -> bytes | None:
        """One row per sample: input, truth, prediction."""
        if not self._pictures:
            return None
        return draw(np.stack([self._pictures[sample] for sample in sorted(self._pictures)]))

    def _table(self) -> npt.NDArray[np.int64]:
        return np.concatenate([np.empty((0, len(TALLIES)), dtype=np.int64), *self._tallies])

    def _keep_pictures(self, samples: Sequence[int], pictures: npt.NDArray[np.uint8]) -> None:
        self._pictures.update(zip(samples, pictures, strict=True))
        for sample in sorted(self._pictures)[PICTURED:]:
            del self._pictures[sample]


_NO_PICTURES: Final = np.empty((0, 3, 0, 0), dtype=np.uint8)


def logits_of(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """[B, S, S, 11]."""
    names = ("inputs", "context_inputs", "context_outputs", "context_mask")
    logits: torch.Tensor = model(**{name: batch[name] for name in names})
    return logits


def loss_of(logits: torch.Tensor, batch: Batch) -> Loss:
    """Mean cross-entropy in nats over all pixels, in fp32. Those of the padding count too: they are how the
    model learns the size of an output.
    """
    targets = batch["targets"].flatten()
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, -2).float(), targets)
    return Loss(mean=mean, count=targets.numel())
