"""How the families of `transformers` differ where a causal language model is to be made of them: what makes one look
back only, which cannot be without a padding token, and how long a text may be.

The samples of a language model task have no padding, so a family that can be without a padding token has none. Some
cannot: roberta and its relatives count positions from the padding token's number (a convention of fairseq), others
hand it to an Embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn
from transformers.utils import logging as transformers_logging

_CONTEXT: Final = "max_position_embeddings"
_CONTEXTS: Final[Mapping[str, str]] = {"mpt": "max_seq_len", "whisper": "max_target_positions"}
"""What the longest text is called where it is not max_position_embeddings, or another name of that."""
_UNLIMITED: Final = -1
"""What stands there in xlnet, which cannot be given a limit; bloom, mamba and others have no such key."""

_LOOKS_BACK: Final[Mapping[str, Any]] = {"is_decoder": True, "causal": True, "attn_type": "uni"}
"""Keys of families that can see both ways, and do by transformers' defaults."""
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    # the exact gelu: transformers' default, the tanh form, costs a quarter of a step on a CPU
    "gpt2": {"activation_function": "gelu"},
    # else positions have two dimensions (axial_pos_shape), whose product must be the context
    "reformer": {"axial_pos_embds": False},
    # one of its adapters must be named
    "xmod": {"default_language": "en_XX"},
}
_NO_TOKEN: Final = -1
_PADDING: Final[Mapping[str, int]] = {
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), _NO_TOKEN),
    **dict.fromkeys(("camembert", "data2vec-text", "xmod", "modernbert-decoder", "xlm"), _NO_TOKEN),
    "prophetnet": 0,  # must be a row of its positions, too
    "reformer": 0,  # fills its last chunk with it, which nothing before looks at
}
"""The families that must have a padding token, and what they get in its place: two of them a token, which is learned
as the others are.
"""
_UNUSED: Final[Mapping[str, int]] = {
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), 1),
    **dict.fromkeys(("camembert", "data2vec-text", "xmod"), 1),
    "prophetnet": 2,  # it also predicts one token further
}
"""Families that count positions from the padding token's number: so many more than that number are never used."""


@contextmanager
def quietly() -> Iterator[None]:
    """Without the bars that transformers draws while it saves and loads, and what it advises against and is meant
    here: token numbers that no token has, no attention mask.
    """

    def advice(record: logging.LogRecord) -> bool:  # one for each use, of which several may be under way
        return not any(words in record.getMessage() for words in ("_token_id", "automatically padded"))

    shown, handlers = (
        transformers_logging.is_progress_bar_enabled(),
        logging.getLogger("transformers").handlers,
    )
    transformers_logging.disable_progress_bar()
    for handler in handlers:
        handler.addFilter(advice)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(advice)
        if shown:
            transformers_logging.enable_progress_bar()


def looks_back(known: Container[str]) -> dict[str, Any]:
    """What makes a family look back only. `known`: the keys of its configuration."""
    return {key: value for key, value in _LOOKS_BACK.items() if key in known}


def defaults_of(model_type: str, known: Container[str]) -> dict[str, Any]:
    """What a plan gets that does not say otherwise."""
    return looks_back(known) | dict(_DEFAULTS.get(model_type, {}))


def set_no_padding(config: Any) -> None:
    """Of a model whose samples have no padding. Raises what transformers raises for a family that has to have it."""
    config.pad_token_id = _PADDING.get(config.model_type)


def padding_of(configuration: Mapping[str, Any]) -> int | None:
    """The padding token of a complete configuration, as only existing weights have one."""
    token = configuration.get("pad_token_id")
    return None if token == _PADDING.get(configuration["model_type"]) else token


def train_every_row(model: nn.Module) -> None:
    """Of its Embeddings: one of them that knows a padding token never trains that row, which of -1 is the last."""
    for module in model.modules():
        if type(module) is nn.Embedding:  # prophetnet's own kind computes with the number
            module.padding_idx = None


def context_key(config: Any) -> str | None:
    """What the longest text is called, as it is written; None for a family without a limit."""
    key = _CONTEXTS.get(config.model_type, _CONTEXT)
    written = str(config.attribute_map.get(key, key))
    return written if getattr(config, written, _UNLIMITED) != _UNLIMITED else None


def context_of(config: Any) -> int | None:
    """The longest text in tokens; None for a model without a limit."""
    key = context_key(config)
    return None if key is None else int(getattr(config, key)) - _unused(config)


def set_context(config: Any, tokens: int) -> None:
    """Make room for so many. Raises ValueError where the family cannot have just so many, and what transformers
    raises for one of another form.
    """
    if config.model_type == "reformer":
        chunk = math.lcm(*(getattr(config, f"{kind}_attn_chunk_length") for kind in set(config.attn_layers)))
        if tokens > chunk and tokens % chunk:
            raise ValueError(f"{tokens} is no multiple of {chunk}, its chunks' length")
    key = context_key(config)
    if key is not None:
        setattr(config, key, tokens + _unused(config))


def _unused(config: Any) -> int:
    return config.pad_token_id + _UNUSED[config.model_type] if config.model_type in _UNUSED else 0
