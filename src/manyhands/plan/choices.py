"""Sections of a plan that name a choice, and which of their settings mean something under which choice.

One table for two uses: a setting that its choice would ignore is refused (compatibility.py), and when a
choice is overridden, what belonged to the old one does not linger under the new one (`overlay`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """`tag`: the key that names the choice; `default`: its value where nothing is said.

    `whole`: every other setting of the section belongs to the choice (a learning rate of one optimizer means
    nothing to another). `idle`: by value of the tag, the settings without effect under it.
    """

    tag: str
    default: str
    whole: bool = False
    idle: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


CHOICES: Final[Mapping[str, Choice]] = {
    "task": Choice(tag="name", default="language_model", whole=True),
    "task.tokenizer": Choice(
        tag="kind",
        default="bpe",
        idle={
            "byte": ("vocabulary_size", "path", "end"),
            "character": ("vocabulary_size", "path", "end"),
            "bpe": ("path", "end"),
            "file": ("vocabulary_size",),
        },
    ),
    "task.text": Choice(
        tag="kind",
        default="files",
        idle={
            "files": ("max_documents", "max_tokens", "column", "subset", "split", "validation_split"),
            "tokens": (
                "max_bytes",
                "max_documents",
                "column",
                "subset",
                "split",
                "validation_split",
                "on_broken",
            ),
            "parquet": ("max_bytes", "subset", "split", "validation_split"),
            "hub": ("max_bytes", "validation_path"),
        },
    ),
    "task.adapter": Choice(tag="name", default="lora", whole=True),
    "local": Choice(
        tag="kind",
        default="steps",
        idle={"gradient": ("optimizer", "keep_inner", "proximal", "control_variate")},
    ),
    "local.optimizer": Choice(
        tag="name",
        default="adamw",
        whole=True,
        idle={"adamw": ("momentum",), "sgd": ("beta1", "beta2", "epsilon")},
    ),
    "schedule": Choice(
        tag="kind",
        default="constant",
        idle={
            "constant": ("total_steps", "decay_steps", "final"),
            "linear": ("decay_steps",),
            "cosine": ("decay_steps",),
        },
    ),
    "codec": Choice(
        tag="name",
        default="fp32",
        whole=True,
        idle={"fp32": ("block", "error_feedback"), "bf16": ("block",)},
    ),
    "change_codec": Choice(
        tag="name",
        default="fp32",
        whole=True,
        idle={"fp32": ("block", "error_feedback"), "bf16": ("block",)},
    ),
    "outer": Choice(
        tag="name",
        default="sgd",
        whole=True,
        idle={
            "sgd": ("beta1", "beta2", "epsilon", "bias_correction"),
            "nesterov": ("beta1", "beta2", "epsilon", "bias_correction"),
            "adamw": ("momentum",),
        },
    ),
    "membership": Choice(tag="kind", default="open", idle={"open": ("allow",)}),
    "data": Choice(tag="kind", default="shared", idle={"local": ("shards", "on_broken")}),
    "merge": Choice(tag="rule", default="mean"),
}


_MODEL: Final = ("task", "model_type", "gpt2", "model")
"""A second choice inside a section: under another model_type the keys of `model` mean nothing."""


def overlay(base: Mapping[str, Any], over: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """`over` on top of `base`: mappings are merged, anything else is replaced; neither argument is changed.

    Where `over` changes a section's choice, the settings of `base` that belonged to the old one are left out.
    """
    merged = dict(_without_old_choice(base, over, path))
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = overlay(
                below if isinstance(below, Mapping) else {}, value, f"{path}.{key}".lstrip(".")
            )
        else:
            merged[key] = value
    return merged


def _without_old_choice(base: Mapping[str, Any], over: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    section, tag, default, belongs = _MODEL
    if path == section and tag in over and over[tag] != base.get(tag, default):
        base = {key: value for key, value in base.items() if key != belongs}
    choice = CHOICES.get(path)
    if choice is None or choice.tag not in over:
        return base
    old, new = base.get(choice.tag, choice.default), over[choice.tag]
    if old == new:
        return base
    if choice.whole:
        return {}
    idle = choice.idle.get(new, ()) if isinstance(new, str) else ()
    return {key: value for key, value in base.items() if key not in idle}
