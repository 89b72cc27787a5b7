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

from manyhands.config.extras import optional
from manyhands.errors import DataError, PlanError
from manyhands.plan.fine_tuning import Adapter

EXTRA = "lora"
CONFIGURATION, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def with_adapter(model: torch.nn.Module, adapter: Adapter) -> torch.nn.Module:
    """`model`, frozen, with new low-rank matrices from the global generator, in training mode; `model` is changed.

    The product of new matrices is zero, so that the outputs are those of the base. Raises PlanError for targets
    that the model does not have, MissingExtra without peft.
    """
    peft = _peft()
    from transformers import PreTrainedModel  # which peft has imported
    from transformers.pytorch_utils import Conv1D

    settings = peft.LoraConfig(
        task_type="CAUSAL_LM" if isinstance(model, PreTrainedModel) else None,
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


def base_of(directory: Path) -> str | None:
    """Where the frozen weights are of an adapter that `save_adapter` wrote: a directory, or a name on the Hub. None
    for a directory without an adapter. Raises DataError, also for a directory that is not there.
    """
    file = directory / CONFIGURATION
    if not file.is_file():
        return None
    try:
        base = str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: {error!r}; give a whole checkpoint") from error
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise DataError(
            f"{directory} is an adapter of the weights in {base}, which are not on this machine: bring them here, "
            f"and write where they are as base_model_name_or_path into {file}"
        )
    return base


def merged(base: torch.nn.Module, directory: Path) -> Any:
    """`base` with the adapter of `directory` merged into its weights. Raises DataError if it is broken or another
    model's, MissingExtra without peft.
    """
    peft = _peft()
    try:
        with _without_noise():
            return peft.PeftModel.from_pretrained(base, str(directory)).merge_and_unload()
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
