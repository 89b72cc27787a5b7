"""Existing weights, made on the spot: a tiny GPT-2 with its tokenizer, as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.plan.schema import Plan
from manyhands.plan.tasks import LanguageModelTask, TextSource
from manyhands.tasks.language_model import FAMILY


@pytest.fixture(scope="session")
def existing(plan_for: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("existing")
    FAMILY.prepare(plan_for("bpe"), directory / "materials")
    task = FAMILY.open(plan_for("bpe"), directory / "materials")
    torch.manual_seed(3)
    task.save_pretrained(dict(task.build_model().named_parameters()), directory / "kept")
    return directory / "kept"


@pytest.fixture(scope="session")
def tuning_plan(existing: Path, text_directory: Path) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        settings: dict[str, Any] = {
            "weights": str(existing),
            "block_size": 16,
            "text": TextSource(path=str(text_directory), validation_share=0.2),
        }
        return Plan(seed=7, task=LanguageModelTask(**(settings | changes)))

    return make
