from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.errors import DataError
from manyhands.plan.schema import Plan
from manyhands.tasks.language_model import FAMILY
from manyhands.tasks.sample import sample_text


@pytest.fixture(scope="module")
def checkpoint(plan_for: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sample")
    FAMILY.prepare(plan_for("byte"), directory / "materials")
    task = FAMILY.open(plan_for("byte"), directory / "materials")
    task.save_pretrained(dict(task.build_model().named_parameters()), directory / "kept")
    return directory / "kept"


def test_a_sample_continues_the_prompt_beyond_the_context(checkpoint: Path) -> None:
    text = sample_text(checkpoint, prompt="def f(x):", tokens=40, top_k=10)  # the context has 16 tokens
    assert text.startswith("def f(x):")
    assert len(text) > 20


def test_the_seed_decides(checkpoint: Path) -> None:
    one, again, other = (sample_text(checkpoint, tokens=30, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_temperature_zero_takes_the_likeliest(checkpoint: Path) -> None:
    assert sample_text(checkpoint, prompt="a", tokens=9, temperature=0, seed=1) == sample_text(
        checkpoint, prompt="a", tokens=9, top_k=1, seed=2
    )


def test_a_directory_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        sample_text(tmp_path)
