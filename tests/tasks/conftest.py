"""Tiny plans of the language model task over made-up text; prepared once where the tests only read."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.plan.schema import Plan
from manyhands.plan.tasks import LanguageModelTask, TextSource, Tokenizer


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    words = ["naïve", "hands", "make", "light", "work", "\n\n", "def f(x):", "€", "<|endoftext|>"]
    generator = random.Random(4)
    for i in range(12):
        text = " ".join(generator.choice(words) for _ in range(300))
        (root / f"file{i:02}.txt").write_text(text, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def plan_for(text_directory: Path) -> Callable[..., Plan]:
    def make(kind: str = "character", seed: int = 7, **changes: Any) -> Plan:
        settings: dict[str, Any] = {
            "model": {"n_layer": 1, "n_head": 2, "n_embd": 16},
            "block_size": 16,
            "text": TextSource(path=str(text_directory), validation_share=0.2),
            "tokenizer": Tokenizer(kind=kind, vocabulary_size=300),
        }
        return Plan(seed=seed, task=LanguageModelTask(**(settings | changes)))

    return make
