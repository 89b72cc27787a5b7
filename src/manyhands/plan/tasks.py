"""What a plan says about its task: one settings class per family of tasks/registry.py, told apart by `name`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from manyhands.config import Settings
from manyhands.plan.tables import Features as Features
from manyhands.plan.tables import SurvivalTask as SurvivalTask
from manyhands.plan.tables import Table as Table
from manyhands.plan.tables import TableSplit as TableSplit
from manyhands.plan.tables import TabularTask as TabularTask

Count = Annotated[int, Field(ge=1)]

_SMALL_GPT2 = {"n_layer": 4, "n_head": 4, "n_embd": 128}


class Tokenizer(Settings):
    """How text becomes tokens. Trained or loaded once, by the server's worker; clients get it as a blob."""

    kind: Literal["byte", "character", "bpe"] = "bpe"
    """byte: 256 values; character: every character of the training text; bpe: byte-level BPE trained on
    it."""
    vocabulary_size: Annotated[int, Field(ge=256, le=65_536)] = 1024
    """Entries of a trained vocabulary (bpe)."""


class TextSource(Settings):
    """Where the text comes from. Read once, by whoever prepares the run."""

    path: str = "stdlib"
    """A file, a directory (its *.txt, *.md and *.py files, sorted by relative path), or `stdlib`: the source
    of Python's own standard library, which every machine with Python has."""
    max_bytes: Count | None = None
    """Stop after this many bytes of text; null reads all of it."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the bytes that is kept for validation, split by file where there are several."""


class LanguageModelTask(Settings):
    """A causal language model of `transformers`, built from a configuration, with random first weights."""

    name: Literal["language_model"] = "language_model"
    """language_model: a causal language model of transformers, trained on text."""
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


class DummyTask(Settings):
    """No model: a worker without torch that sleeps and sends an update of the wanted size. For tests and
    benches."""

    name: Literal["dummy"] = "dummy"
    """dummy: no model and no torch; a worker that sleeps and sends an update of the wanted size."""
    parameters: Count = 2_500_000
    """Number of fp32 parameters, hence 4 bytes each in a dense update."""
    tensors: Count = 4
    """Into how many tensors they are divided."""
    samples: Count = 1_000_000
    """Size of the pretended data set."""
    delay_s: Annotated[float, Field(ge=0)] = 0.0
    """How long one round of work sleeps."""


class CustomTask(Settings):
    """A user's own task, by dotted name. A client runs it only when its owner has allowed that name."""

    name: Literal["custom"] = "custom"
    """custom: a user's own task, by dotted name."""
    target: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """module:object, importable on every client; object implements the Task protocol."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Handed to the task as it is."""


TaskSettings = Annotated[
    LanguageModelTask | TabularTask | SurvivalTask | DummyTask | CustomTask, Field(discriminator="name")
]
