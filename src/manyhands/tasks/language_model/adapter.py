"""LoRA: low-rank matrices beside the frozen weights of a model, by the package `peft`.

The base model's parameters stay parameters of the model, frozen; only the adapter's train and travel. What a person
keeps is the adapter alone, as peft loads it onto the same base.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (2106.09685).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from manyhands.config.extras import optional
from manyhands.errors import DataError, PlanError
from manyhands.plan.language_model import Adapter
from manyhands.tasks.model_configuration import without_progress_bars

EXTRA = "lora"
CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def with_adapter(model: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """`model`, frozen, with new low-rank matrices from the global generator, in training mode; `model` is changed.

    The product of new matrices is zero, so that the outputs are those of the base. Raises PlanError for targets
    that the model does not have, MissingExtra without peft.
    """
    peft = _peft()
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=list(adapter.targets) or "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    try:
        with _without_noise():
            made = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise PlanError(
            f"task.adapter.targets {list(adapter.targets)}: {' '.join(str(error).split())[:200]}; give names of the "
            "model's linear modules, or none for all of them"
        ) from error
    module: torch.nn.Module = made.float().train()
    return module


def save_adapter(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], base: str, directory: Path
) -> None:
    """adapter_config.json and adapter_model.safetensors into `directory`, which may be new.

    `model` is one that `with_adapter` made, on any device; `weights` are its parameters by name; `base` is where
    peft is to find the frozen weights.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = _peft().get_peft_model_state_dict(model, state_dict=dict(weights), save_embedding_layers=False)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(kept, directory / WEIGHTS, metadata={"format": "pt"})
    settings = model.peft_config["default"].to_dict()  # type: ignore[index, union-attr]
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(settings, indent=2, sort_keys=True, default=_plain)
    (directory / CONFIGURATION).write_text(text + "\n", encoding="utf-8")


def load_merged(directory: Path) -> Any:
    """The base model of a directory that `save_adapter` wrote, with the adapter merged into its weights, in fp32 on
    the CPU. Raises DataError if the base is not where it was or either is broken, MissingExtra without peft.
    """
    peft = _peft()
    try:
        base = json.loads((directory / CONFIGURATION).read_text(encoding="utf-8"))["base_model_name_or_path"]
        with without_progress_bars(), _without_noise():
            model = AutoModelForCausalLM.from_pretrained(
                base,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
            return peft.PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"adapter {directory}: {' '.join(str(error).split())[:300]}; its base_model_name_or_path in "
            f"{CONFIGURATION} must be where the weights are that it was trained on"
        ) from error


def _plain(value: object) -> object:
    """peft keeps sets, whose order is another one in each process."""
    return sorted(value) if isinstance(value, set) else str(value)


def _peft() -> ModuleType:
    with _without_noise():
        return optional("peft", extra=EXTRA, option="task.adapter")


@contextmanager
def _without_noise() -> Iterator[None]:
    """peft asks transformers in words that the latter has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")
        yield
