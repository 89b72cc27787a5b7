"""Checkpoints of a language model by themselves, without the run that wrote them: offline, and no code is run.

Shapes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyhands.errors import DataError
from manyhands.tasks.adapter import CONFIGURATION, base_of, merged
from manyhands.tasks.causal_models import context_of, quietly
from manyhands.tasks.protocol import Saved
from manyhands.tasks.saved import task_that_saved


class Logits(torch.nn.Module):
    """A causal model of transformers with one input and one output: int64 [B, T] -> fp32 [B, T, V]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def load_saved(directory: Path) -> Saved:
    """The model of a checkpoint, with an adapter merged into its base, and an example of its input."""
    model = load_language_model(directory)
    # one more than its length is what the check of an export asks
    length = min(16, (context_of(model.config) or 17) - 1)
    ids_BT = torch.arange(2 * length).view(2, length) % int(model.config.vocab_size)
    return Saved(
        model=model.float(),
        call=Logits(model).eval(),
        inputs={"input_ids": ids_BT},
        axes={"input_ids": {0: "batch", 1: "sequence"}},
        outputs=("logits",),
    )


def load_language_model(directory: Path) -> Any:
    """The model of a checkpoint, a PreTrainedModel in evaluation mode; of an adapter, its base with the adapter
    merged into it. Raises DataError.
    """
    task = task_that_saved(directory)
    if task not in (None, "language_model"):
        raise DataError(
            f"{directory} is of the task {task}: give a checkpoint that a language model run wrote"
        )
    base = base_of(directory)
    if base is not None:
        return merged(
            _pretrained(base, f"{directory / CONFIGURATION}: its base_model_name_or_path {base!r}").float(),
            directory,
        ).eval()
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{directory} has no config.json and no {CONFIGURATION}: give a checkpoint that a language model "
            "run wrote"
        )
    return _pretrained(directory, str(directory)).eval()


def _pretrained(name: str | Path, where: str) -> Any:
    try:
        with quietly():
            return AutoModelForCausalLM.from_pretrained(
                name, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{where} is no language model that can be read: {' '.join(str(error).split())[:200]}; give a "
            "checkpoint that a language model run wrote"
        ) from error


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a checkpoint, as transformers has it. Raises DataError."""
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory} has no tokenizer that can be read: {' '.join(str(error).split())[:200]}; give a checkpoint "
            "that a language model run wrote"
        ) from error
