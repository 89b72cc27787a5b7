"""How the families of `transformers` differ where a causal language model is to be made of them: what makes one look
back only, which cannot be without a padding token, and how long a text may be.

The samples of a language model task have no padding, so a family that can be without a padding token has none. Some
cannot: roberta and its relatives count positions from the padding token's number (a convention of fairseq), others
hand it to an Embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Mapping
from typing import Any, Final

from torch import nn

CONTEXT: Final = "max_position_embeddings"
"""Every causal configuration has it, gpt2 as another name of n_positions."""
UNLIMITED: Final = -1
"""What stands there for a family without a limit (xlnet), which cannot be given one."""

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
"""The families that must have a padding token, and what they get in its place."""
_UNUSED: Final[Mapping[str, int]] = {
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"), 1),
    **dict.fromkeys(("camembert", "data2vec-text", "xmod"), 1),
    "prophetnet": 2,  # it also predicts one token further
}
"""Families that count positions from the padding token's number: so many more than that number are never used."""


class _Unexpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in ("_token_id", "automatically padded"))


for _name in (
    "configuration_utils",
    "generation.configuration_utils",
    "modeling_utils",
    "models.reformer.modeling_reformer",
):
    logging.getLogger(f"transformers.{_name}").addFilter(_Unexpected())  # what is done here on purpose


def looks_back(known: Container[str]) -> dict[str, Any]:
    """What makes a family look back only. `known`: the keys of its configuration."""
    return {key: value for key, value in _LOOKS_BACK.items() if key in known}


def defaults_of(model_type: str, known: Container[str]) -> dict[str, Any]:
    """What a plan gets that does not say otherwise."""
    return looks_back(known) | dict(_DEFAULTS.get(model_type, {}))


def set_no_padding(config: Any) -> None:
    """No token of the vocabulary is padding. Raises what transformers raises for a family that has to have one."""
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


def context_of(config: Any) -> int | None:
    """The longest text in tokens; None for a model without a limit."""
    positions = getattr(config, CONTEXT, UNLIMITED)
    return None if positions == UNLIMITED else int(positions) - _unused(config)


def set_context(config: Any, tokens: int) -> None:
    """Make room for so many. Raises what transformers raises for a family of another form."""
    if config.model_type == "reformer":
        chunk = math.lcm(*(getattr(config, f"{kind}_attn_chunk_length") for kind in set(config.attn_layers)))
        if tokens > chunk and tokens % chunk:
            raise ValueError(f"{tokens} is no multiple of {chunk}, its chunks' length")
    if getattr(config, CONTEXT, None) != UNLIMITED:
        setattr(config, CONTEXT, tokens + _unused(config))


def _unused(config: Any) -> int:
    return config.pad_token_id + _UNUSED[config.model_type] if config.model_type in _UNUSED else 0
