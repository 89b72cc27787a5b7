"""Optional parts: the option that misses one names the extra that brings it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from manyhands.config.extras import EXTRAS, optional
from manyhands.errors import MissingExtra


def test_what_is_installed_is_imported() -> None:
    assert optional("json", extra="hub", option="--hub-repo") is json


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.inner"])
def test_what_is_missing_is_named_with_its_extra(module: str) -> None:
    with pytest.raises(MissingExtra) as caught:
        optional(module, extra="wandb", option="--wandb-project")
    assert str(caught.value) == (
        "--wandb-project needs the package 'no_such_package', which is not installed: "
        "pip install 'manyhands[wandb]'"
    )


def test_a_broken_package_keeps_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installing the extra once more would not help there."""
    (tmp_path / "broken_package.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        optional("broken_package", extra="hub", option="--hub-repo")


def test_the_extras_are_those_of_the_package() -> None:
    provided = set(importlib.metadata.metadata("manyhands").get_all("Provides-Extra") or ())
    assert set(EXTRAS) == provided - {"all", "dev"}
