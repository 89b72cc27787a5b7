"""Existing weights as first weights: config.json and safetensors, as `transformers` writes them.

Nothing is unpickled and no code of the directory is run: a pickle, or a configuration that names code, is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM

from manyhands.config import run_like
from manyhands.errors import DataError, PlanError
from manyhands.plan.safety import refuse_code
from manyhands.tasks.adapter import base_of, merged
from manyhands.tasks.causal_models import (
    context_key,
    context_of,
    looks_back,
    quietly,
    set_no_padding,
    train_every_row,
)
from manyhands.tasks.hub import WEIGHT_FILES, local_copy
from manyhands.tasks.model_configuration import (
    as_trained,
    causal_configuration,
    with_attention,
)

SETTING: Final = "task.weights"
_PICKLES: Final = ("*.bin", "*.pt", "*.pth")


def weights_directory(name: str) -> Path:
    """Where the weights are on this machine. Raises DataError if they are not to be had, or only as a pickle."""
    try:
        directory = local_copy(name, WEIGHT_FILES, setting=SETTING)
    except DataError as error:
        if "/" in name:
            raise
        raise DataError(f"{error}. No run here has that name.{run_like(name)}") from error
    if base_of(directory) is not None:  # an adapter, beside the weights of another directory
        return directory
    if not (directory / "config.json").is_file():
        raise DataError(
            f"{SETTING} {name!r}: {directory} has no config.json: give a directory of transformers"
        )
    if any(directory.glob("*.safetensors")):
        return directory
    if any(file for pattern in _PICKLES for file in directory.glob(pattern)):
        raise DataError(
            f"{SETTING} {name!r}: {directory} has its weights as a pickle, which can run code when it is read, and "
            "is never read here. Where you trust it, load it with transformers and save_pretrained() it: that writes "
            "safetensors"
        )
    raise DataError(f"{SETTING} {name!r}: {directory} has no *.safetensors: fetch the weights")


def existing_configuration(
    directory: Path, *, block_size: int, vocabulary_size: int, end_id: int
) -> dict[str, Any]:
    """The complete configuration of the weights' model as plain data; it looks back only, dropout is off, END is
    the run's.

    Raises DataError for one that is broken or names code; PlanError if the tokens do not fit the model.
    """
    file = _bases(directory)[-1] / "config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: {error}; fetch the weights again") from error
    _refuse(values, file)
    config = causal_configuration(
        {k: v for k, v in values.items() if k not in ("transformers_version", "_name_or_path")}, f"{file}"
    )
    for key in ("vocab_size", context_key(config)):
        if key is not None and not isinstance(getattr(config, key), int):
            raise DataError(
                f"{file}: {key!r} is {getattr(config, key)!r}, expected a number; fetch the weights again"
            )
    if not _is_token(getattr(config, "pad_token_id", None), vocabulary_size):
        set_no_padding(config)
    context = context_of(config)
    if context is not None and context < block_size:
        raise PlanError(
            f"task.block_size is {block_size}, and the model of {SETTING} has a context of {context} tokens: "
            f"set task.block_size to {context} or less"
        )
    if config.vocab_size < vocabulary_size:
        raise PlanError(
            f"the tokenizer has {vocabulary_size} tokens, and the model of {SETTING} knows {config.vocab_size}: give "
            "the tokenizer that belongs to the weights (task.tokenizer.path)"
        )
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    for key, value in looks_back(config.to_dict()).items():
        setattr(config, key, value)
    config.eos_token_id = end_id
    if not _is_token(getattr(config, "bos_token_id", None), vocabulary_size):
        config.bos_token_id = end_id
    return as_trained(config)


def load_existing(directory: Path, configuration: Mapping[str, Any]) -> torch.nn.Module:
    """The model with the weights of `directory`, in fp32 and training mode, on the CPU. Raises DataError if they
    are not whole or not those of the configuration.
    """
    *adapters, directory = _bases(directory)
    model = _load(directory, configuration)
    for adapter in reversed(adapters):
        model = merged(model, adapter)
    train_every_row(model)
    module: torch.nn.Module = model.float().train()
    return module


def _bases(directory: Path) -> list[Path]:
    """The directory, and where it has an adapter what that is of, down to whole weights. Raises DataError."""
    found = [directory]
    while (base := base_of(found[-1])) is not None:
        below = local_copy(base, WEIGHT_FILES, setting=SETTING)
        if below.resolve() in {each.resolve() for each in found}:
            raise DataError(
                f"{SETTING} {directory}: the adapter in {below} is its own base; give whole weights"
            )
        found.append(below)
    return found


def _load(directory: Path, configuration: Mapping[str, Any]) -> torch.nn.Module:
    config = AutoConfig.for_model(**{k: v for k, v in configuration.items() if k != "transformers_version"})

    def load(attention: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )

    try:
        with quietly():
            model, info = with_attention(load)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            f"{SETTING} {directory}: {' '.join(str(error).split())[:300]}; fetch the weights again"
        ) from error
    for fault in ("missing_keys", "mismatched_keys"):
        if found := info[fault]:
            raise DataError(
                f"{SETTING} {directory}: {len(found)} {fault.replace('_', ' ')} of model_type {config.model_type!r}, "
                f"as {min(map(str, found))!r}: files are missing, or not of this configuration; fetch them again"
            )
    loaded: torch.nn.Module = model
    return loaded


def _is_token(value: Any, vocabulary_size: int) -> bool:
    return isinstance(value, int) and 0 <= value < vocabulary_size


def _refuse(values: Any, file: Path) -> None:
    if not isinstance(values, dict):
        raise DataError(
            f"{file} is a JSON {type(values).__name__}, expected an object; fetch the weights again"
        )
    if values.get("auto_map"):
        raise DataError(
            f"{file} names code to run (auto_map), which is never run here: give a model that transformers knows"
        )
    if values.get("quantization_config"):
        raise DataError(
            f"{file} is of quantized weights, which cannot be trained: give those of full precision"
        )
    refuse_code(values, str(file))
