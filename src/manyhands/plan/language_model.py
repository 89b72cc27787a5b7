"""What a plan says about a language model task: its text, its tokenizer, its model, and what of it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from manyhands.config import LocalPath, Settings
from manyhands.plan.fine_tuning import FineTuned

Count = Annotated[int, Field(ge=1)]

_SMALL_GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 128}


class Tokenizer(Settings):
    """How text becomes tokens. Trained or loaded once, by the server's worker; clients get it as a blob."""

    kind: Literal["byte", "character", "bpe", "file"] = "bpe"
    """byte: 256 values; character: every character of the training text; bpe: byte-level BPE trained on
    it; file: an existing one, from `path`."""
    vocabulary_size: Annotated[int, Field(ge=256, le=65_536)] = 1024
    """Entries of a trained vocabulary (bpe)."""
    path: LocalPath | None = None
    """A tokenizer.json, a directory with one or with vocab.json and merges.txt (GPT-2's form), a tokenizer
    directory of transformers, or a name on the Hugging Face Hub (file)."""
    end: str | None = None
    """The token that stands behind each document; null: the one that the tokenizer's own configuration names
    (file)."""


class TextSource(Settings):
    """Where the text comes from. Read once, by whoever prepares the run; clients get tokens."""

    kind: Literal["files", "tokens", "parquet", "hub"] = "files"
    """files: text files; tokens: text that is tokens already; parquet: rows of Parquet files; hub: a data set
    that the package `datasets` loads, streamed."""
    path: LocalPath = "stdlib"
    """files: a file, a directory (its *.txt, *.md and *.py files, sorted by relative path), or `stdlib`: the
    source of Python's own standard library, which every machine with Python has. tokens: a .bin file of uint16
    without a header, as nanoGPT writes it, or a .npy file of integers. parquet: a file, or a directory of
    them. hub: OWNER/NAME, or a directory that `datasets` loads."""
    validation_path: LocalPath | None = None
    """Where the validation text is, in the same form; null: a share of `path` (files, tokens, parquet)."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share that is kept for validation. files: of the bytes, split by file where there are several; tokens:
    the end; parquet and hub: by the hash of each document, so that equal documents stay together."""
    max_bytes: Count | None = None
    """Stop after this many bytes of text; null reads all of it (files)."""
    max_documents: Count | None = None
    """Stop after this many documents; null reads all of them (parquet, hub)."""
    max_tokens: Count | None = None
    """Stop after about this many tokens, at the end of a document; null takes all of them (tokens, parquet,
    hub)."""
    column: str = "text"
    """The column that holds the text (parquet, hub)."""
    subset: str | None = None
    """The data set's configuration, where it has several (hub)."""
    split: str = "train"
    """The data set's split for training (hub)."""
    validation_split: str | None = None
    """The data set's split for validation; null: a share of `split` (hub)."""
    on_broken: Literal["stop", "skip"] = "stop"
    """A file that is no UTF-8 or cannot be read, or a document that is no text: stop, naming it; or skip it,
    counted and named in the run's split.json. Of `stdlib`, which has tests of other encodings, such files are
    always skipped (files, parquet, hub)."""


class LanguageModelTask(FineTuned):
    """A causal language model of `transformers`, from a configuration with random first weights, or from existing
    weights, trained whole or through an adapter."""

    name: Literal["language_model"] = "language_model"
    """language_model: a causal language model of transformers, trained on text."""
    weights: LocalPath | None = None
    """Existing weights to start from: a directory of transformers (config.json and safetensors), or a name on
    the Hugging Face Hub. The model and, unless the plan says otherwise, the tokenizer are those of the
    weights; null: random weights."""
    model_type: str = "gpt2"
    """A causal `model_type` that transformers knows (gpt2, llama, qwen3, ...)."""
    model: dict[str, Any] = Field(default_factory=lambda: dict(_SMALL_GPT2))
    """Keys of that model's configuration class; vocabulary size and context length are filled in. A gpt2
    without n_layer, n_head or n_embd gets 4, 4 and 128; other model types say theirs."""
    block_size: Annotated[int, Field(ge=8)] = 64
    """Tokens per sample."""
    text: TextSource = TextSource()
    """Training and validation text."""
    tokenizer: Tokenizer = Tokenizer()
    """How that text becomes tokens."""

    @field_validator("model", mode="after")
    @classmethod
    def _small_gpt2(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """So that `task.model.n_layer=2` changes one thing, and not also the width to that of GPT-2 124M."""
        return {**_SMALL_GPT2, **value} if info.data.get("model_type") == "gpt2" else value

    @model_validator(mode="before")
    @classmethod
    def _tokenizer_of_the_weights(cls, data: Any) -> Any:
        """Written into the plan, so that it says where its tokens come from."""
        if not isinstance(data, Mapping) or not data.get("weights") or "tokenizer" in data:
            return data
        return {**data, "tokenizer": {"kind": "file", "path": data["weights"]}}
