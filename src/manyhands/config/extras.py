"""Optional parts: packages that an extra of manyhands installs, and that are imported by the option that uses one."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Final

from manyhands.errors import MissingExtra

EXTRAS: Final[Mapping[str, tuple[str, ...]]] = {
    "chess": ("chess",),
    "eval": ("lm_eval",),
    "hub": ("datasets",),
    "lora": ("peft",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "shards": ("pyarrow",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
}
"""extra -> the modules that it brings, as pyproject.toml has them."""


def optional(module: str, *, extra: str, option: str) -> ModuleType:
    """The module, imported now. Raises MissingExtra, which names `option` and the extra, where it is not installed.

    A module that is installed and misses one of its own is broken in another way: that error is left as it is.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise missing(package, extra=extra, option=option) from None


def missing(package: str, *, extra: str, option: str) -> MissingExtra:
    return MissingExtra(
        f"{option} needs the package '{package}', which is not installed: pip install 'manyhands[{extra}]'"
    )
