from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from manyhands.errors import DataError
from manyhands.plan.schema import Plan
from manyhands.tasks.language_model import FAMILY
from manyhands.tasks.sample import sample_text


@pytest.fixture(scope="module")
def checkpoint(plan_for: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sample")
    FAMILY.prepare(plan_for("byte"), directory / "materials")
    task = FAMILY.open(plan_for("byte"), directory / "materials")
    torch.manual_seed(0)
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


def test_a_prompt_that_the_tokenizer_does_not_know(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    for kind in ("character", "byte", "bpe"):
        FAMILY.prepare(plan_for(kind), tmp_path / kind)
        task = FAMILY.open(plan_for(kind), tmp_path / kind)
        task.save_pretrained(dict(task.build_model().named_parameters()), tmp_path / f"{kind}-kept")
    with pytest.raises(
        DataError, match=r"'QmQ€£' has 'Q', '£', which the tokenizer in .*character-kept does not know: leave"
    ):
        sample_text(tmp_path / "character-kept", prompt="QmQ€£", tokens=2)
    for known in ("m€ \n", "m<|unknown|><|endoftext|>"):
        sample_text(tmp_path / "character-kept", prompt=known, tokens=2)
    for kind in ("byte", "bpe"):
        text = sample_text(tmp_path / f"{kind}-kept", prompt="Q £\t\U0001f600 e\u0301 ", tokens=1)
        assert text.startswith("Q £\t\U0001f600 e\u0301 ")


def test_a_tokenizer_without_an_unknown_token_drops_nothing_unsaid(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "kept")
    file = tmp_path / "kept" / "tokenizer.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    del known["model"]["vocab"]["Q"]
    known["normalizer"] = {"type": "NFC"}
    file.write_text(json.dumps(known), encoding="utf-8")
    sample_text(tmp_path / "kept", prompt="a e\u0301 b", tokens=1)
    with pytest.raises(DataError, match="'aQ' has 'Q', which"):
        sample_text(tmp_path / "kept", prompt="aQ", tokens=1)
