"""From the plan's task settings to a complete configuration of a `transformers` model, and to the model
itself.

The plan names a model_type and some keys; vocabulary and context length come from the tokens. The complete
configuration is a material of the run (model.json), so that every client builds the same model whatever the
defaults of its version of transformers are. Unknown keys are refused: transformers would take and ignore
them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from manyhands.errors import PlanError, WorkerError
from manyhands.plan.language_model import LanguageModelTask
from manyhands.tasks.causal_models import (
    context_key,
    context_of,
    defaults_of,
    quietly,
    set_context,
    set_no_padding,
    train_every_row,
)

T = TypeVar("T")

ATTENTION = "sdpa"
"""Measured with a GPT of 4 layers, 4 heads, 128 wide at 12 x 64 tokens in fp32 on two CPU cores: sdpa is
10% faster than eager with one thread and 3% with two; on GPUs it is what calls the fused kernels."""

_FILLED_IN = (
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "model_type",
    "dtype",
    "torch_dtype",
)
_FAULTS: Final = (
    TypeError, ValueError, RuntimeError, AssertionError, AttributeError, LookupError, ZeroDivisionError,
    NotImplementedError, ImportError, StrictDataclassError,
)  # fmt: skip
"""What the models of transformers raise for keys that do not go together."""


@quietly()
def model_configuration(task: LanguageModelTask, vocabulary_size: int, end_id: int) -> dict[str, Any]:
    """The complete configuration as plain data. Raises PlanError for keys or values that do not fit the
    model.

    Dropout is off unless the plan sets it: small models on fresh text do better without, and work is
    repeatable. What else a family gets is in causal_models.py.
    """
    config = _checked(task)
    try:
        config.vocab_size = vocabulary_size
        config.bos_token_id = config.eos_token_id = end_id
    except _FAULTS as error:
        raise PlanError(
            f"model_type {task.model_type!r} cannot be given the tokenizer's vocabulary: {_first_lines(error)}; "
            "use another, as gpt2 or llama"
        ) from error
    return as_trained(config)


@quietly()
def check_model(task: LanguageModelTask) -> None:
    """Raise PlanError for keys or values that do not fit the model, before there is a tokenizer."""
    _checked(task)


def _checked(task: LanguageModelTask) -> Any:
    """The configuration, without what the tokenizer fills in."""
    known = _known_keys(task)
    for key in task.model:
        if key in _FILLED_IN:
            raise PlanError(f"task.model.{key} is filled in from the tokenizer; leave it out")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
            hint = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(sorted(known))}."
            raise PlanError(f"unknown key 'task.model.{key}' for model_type {task.model_type!r}. {hint}")
    values = defaults_of(task.model_type, known) | task.model
    for key in known:
        if "drop" in key or key.endswith("_pdrop"):
            values.setdefault(key, 0.0)
    try:
        config = AutoConfig.for_model(task.model_type, **values)
        set_no_padding(config)
    except _FAULTS as error:
        raise PlanError(f"task.model for {task.model_type!r}: {_first_lines(error)}") from error
    limit = context_key(config)
    named = {
        name for name in task.model if limit is not None and config.attribute_map.get(name, name) == limit
    }
    if not named:
        try:
            set_context(config, task.block_size)
        except _FAULTS as error:
            raise PlanError(
                f"model_type {task.model_type!r} has no context of task.block_size tokens: {_first_lines(error)}; "
                "use another, as gpt2 or llama"
            ) from error
    elif (context := context_of(config)) is not None and context < task.block_size:
        raise PlanError(
            f"task.model.{named.pop()} is {getattr(config, str(limit))}, less than task.block_size "
            f"{task.block_size} needs: leave it out, or make it larger"
        )
    return config


def as_trained(config: Any) -> dict[str, Any]:
    """A configuration as plain data, of a model in fp32."""
    config.dtype = "float32"
    return dict(config.to_dict())


@quietly()
def causal_configuration(values: Mapping[str, Any], where: str) -> Any:
    """A configuration object of transformers from the plain data of `where`. Raises PlanError if there is no causal
    language model for it.
    """
    try:
        config = AutoConfig.for_model(**values)
    except _FAULTS as error:
        raise PlanError(f"{where}, model_type {values.get('model_type')!r}: {_first_lines(error)}") from error
    _check_language_model(config, f"{where}: model_type")
    return config


@quietly()
def build_model(configuration: Mapping[str, Any]) -> torch.nn.Module:
    """A model of this configuration with random weights from the global generator, in fp32 and in training
    mode.
    """
    kind = configuration.get("model_type")
    try:
        config = AutoConfig.for_model(
            **{key: value for key, value in configuration.items() if key != "transformers_version"}
        )
        model = with_attention(
            lambda attention: AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        )
    except _FAULTS as error:
        if "can't allocate memory" in str(error):
            raise WorkerError(
                f"a model of these sizes does not fit in memory: make it smaller (task.model): {_first_lines(error)}"
            ) from error
        raise PlanError(
            f"model_type {kind!r} cannot be made as task.model describes it: {_first_lines(error)}"
        ) from error
    train_every_row(model)
    module: torch.nn.Module = model.float().train()
    return module


@quietly()
def check_causal(model: torch.nn.Module, configuration: Mapping[str, Any]) -> None:
    """Raises PlanError for a model that sees the tokens which it is to predict, as one that was made to fill gaps
    does, or that cannot be called with tokens alone.
    """
    kind, count = configuration["model_type"], min(8, int(configuration["vocab_size"]))
    tokens = torch.arange(count, device="cpu").remainder(count)[None]
    other = tokens.clone()
    other[0, -1] = 0
    training = model.training
    try:
        with torch.no_grad():
            model.eval()
            first, second = (model(input_ids=ids, use_cache=False).logits[0, :-1] for ids in (tokens, other))
    except _FAULTS as error:
        raise PlanError(
            f"model_type {kind!r} as task.model describes it fails on {count} tokens: {_first_lines(error)}. Its "
            "keys must fit together (num_key_value_heads, head_dim, ...), or it needs more than text: correct them, "
            "or use another, as gpt2 or llama"
        ) from error
    finally:
        model.train(training)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-5):
        raise PlanError(
            f"model_type {kind!r} sees the tokens that it is to predict: make it causal (task.model.is_decoder=true, "
            "where it has that), or use another, as gpt2 or llama"
        )


def with_attention(make: Callable[[str], T]) -> T:
    """What `make` gives with the name of our attention, or with "eager" for a model that has no other."""
    try:
        return make(ATTENTION)
    except ValueError as error:
        if "sdpa" not in str(error) and "scaled_dot_product" not in str(error):
            raise
        return make("eager")


def _known_keys(task: LanguageModelTask) -> set[str]:
    try:
        config = AutoConfig.for_model(task.model_type)
    except ValueError as error:
        raise PlanError(
            f"task.model_type {task.model_type!r} is not one that transformers knows; "
            "use for example gpt2, llama or qwen3"
        ) from error
    except _FAULTS as error:
        raise PlanError(
            f"task.model_type {task.model_type!r} cannot be used: {_first_lines(error)}"
        ) from error
    _check_language_model(config, "task.model_type")
    return set(config.to_dict()) | set(config.attribute_map)


def _check_language_model(config: Any, where: str) -> None:
    """Raises PlanError for a family that is no causal language model, or has one only as one of its parts."""
    text = config.get_text_config(decoder=True)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and hasattr(config, "vocab_size"):
        return
    if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING and text is not config:
        raise PlanError(
            f"{where} {config.model_type!r} is of text and more: use its part for text, {text.model_type!r}"
        )
    raise PlanError(f"{where} {config.model_type!r} is no causal language model; use for example gpt2")


def _first_lines(error: Exception) -> str:
    """What an error of transformers says, without the page of known classes that some of them append."""
    text = " ".join(line.strip() for line in str(error).splitlines()[:3])
    return text if len(text) <= 300 else text[:300] + " ..."
