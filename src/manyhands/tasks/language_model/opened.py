"""An opened language model task: batches of tokens, the model, its loss, and what a person keeps of it.

A sample is block_size tokens and the one after them; samples do not overlap in what they predict. The loss
is the mean cross-entropy in nats per token, computed in fp32.

Shapes: B samples, T = block_size tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast

from manyhands.data.tokens import TokenArray, sample_count, windows
from manyhands.plan.fine_tuning import Adapter
from manyhands.tasks.adapter import save_adapter, with_adapter
from manyhands.tasks.causal_models import padding_of, quietly
from manyhands.tasks.model_configuration import build_model
from manyhands.tasks.protocol import TRAINING, VALIDATION, Batch, Loss, Metrics
from manyhands.tasks.tokenizer import UNKNOWN


@dataclass(slots=True, kw_only=True)
class LanguageModel:
    """An opened language model task; implements tasks.protocol.Task."""

    block_size: int
    configuration: dict[str, Any]
    tokenizer: FastTokenizer
    training: TokenArray
    validation: TokenArray
    adapter: Adapter | None = None
    base: str | None = None  # where the frozen weights are, with an adapter
    unit: str = "tokens"
    warnings: tuple[str, ...] = ()  # implements Warns too
    evaluation_sets: tuple[str, ...] = (VALIDATION,)

    def build_model(self) -> torch.nn.Module:
        """A new model in fp32 and training mode, on the CPU; its weights are overwritten before use."""
        model = build_model(self.configuration)
        return model if self.adapter is None else with_adapter(model, self.adapter)

    def samples(self, split: str = TRAINING) -> int:
        return sample_count(len(self._tokens(split)), self.block_size)

    def tokens_per_sample(self) -> int:
        return self.block_size

    def batch(self, indices: npt.NDArray[np.int64], split: str = TRAINING) -> Batch:
        """{"tokens": int64 [B, T + 1]}: inputs are all but the last, targets all but the first."""
        return {"tokens": torch.from_numpy(windows(self._tokens(split), indices, self.block_size))}

    def _tokens(self, split: str) -> TokenArray:
        return self.training if split == TRAINING else self.validation

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """Mean cross-entropy of the next token in nats, in fp32."""
        tokens = batch["tokens"]
        targets = tokens[:, 1:].reshape(-1)  # [B * T]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits  # [B, T, V]
        mean = F.cross_entropy(logits.reshape(targets.numel(), -1).float(), targets)
        return Loss(mean=mean, count=targets.numel())

    def metrics(self, split: str) -> Metrics:  # noqa: ARG002 - the same for all
        return Metrics(self)

    def save_pretrained(self, weights: Mapping[str, torch.Tensor], directory: Path) -> None:
        """Config, safetensors and tokenizer, as AutoModelForCausalLM and AutoTokenizer load them offline; with an
        adapter its own configuration and tensors alone, as peft loads them onto the base.
        """
        with quietly(), torch.device("meta"):
            model = self.build_model()
        if self.adapter is not None:
            save_adapter(model, weights, self.base or "", directory)
        else:
            with quietly():
                model.save_pretrained(directory, state_dict=dict(weights))  # type: ignore[operator]
        as_transformers(self.tokenizer, self.configuration, self.block_size).save_pretrained(directory)


def as_transformers(
    tokenizer: FastTokenizer, configuration: Mapping[str, Any], block_size: int
) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers knows it, with the special tokens named that the model's configuration has."""
    ids = {f"{name}_token": configuration.get(f"{name}_token_id") for name in ("bos", "eos")}
    ids["pad_token"] = padding_of(configuration)
    special = {name: tokenizer.id_to_token(token) for name, token in ids.items() if token is not None}
    if tokenizer.token_to_id(UNKNOWN) is not None:
        special["unk_token"] = UNKNOWN
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=block_size, clean_up_tokenization_spaces=False, **special
    )
