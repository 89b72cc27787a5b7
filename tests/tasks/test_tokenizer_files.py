from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as FastTokenizer

from manyhands.errors import DataError
from manyhands.plan.language_model import Tokenizer
from manyhands.tasks.tokenizer import END, RunTokenizer, encode, make_tokenizer
from manyhands.tasks.tokenizer_files import load_tokenizer

GPT2 = Path(__file__).parents[3] / "shared" / "data" / "gpt2-bpe"
TEXTS = ["hands make light work", "light hands"]


def loaded(path: Path, **settings: Any) -> RunTokenizer:
    return make_tokenizer(Tokenizer(kind="file", path=str(path), **settings), ())


@pytest.fixture
def trained() -> RunTokenizer:
    return make_tokenizer(Tokenizer(kind="bpe", vocabulary_size=280), TEXTS)


def ids(tokenizer: RunTokenizer) -> list[list[int]]:
    return [document.tolist() for document in encode(tokenizer, TEXTS)]


def test_a_saved_tokenizer_gives_the_same_ids(tmp_path: Path, trained: RunTokenizer) -> None:
    trained.fast.enable_truncation(2)
    trained.fast.enable_padding(length=50)
    trained.fast.save(str(tmp_path / "tokenizer.json"))
    trained.fast.no_truncation()
    trained.fast.no_padding()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        found = loaded(path)
        assert (found.size, found.end) == (trained.size, END)
        assert ids(found) == ids(trained), "neither cut nor padded"


def test_the_form_of_gpt2(tmp_path: Path, trained: RunTokenizer) -> None:
    model = json.loads(trained.fast.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    assert ids(loaded(tmp_path)) == ids(trained)


@pytest.mark.skipif(not GPT2.is_dir(), reason=f"needs GPT-2's vocabulary in {GPT2}")
def test_gpt2_itself() -> None:
    """The ids that OpenAI's own encoder gives."""
    found = loaded(GPT2)
    assert (found.size, found.end_id) == (50_257, 50_256)
    (document,) = encode(found, ["Hello world, hello\n\n<|endoftext|>"])
    assert document.tolist()[:3] == [15_496, 995, 11]
    assert document.tolist()[-1] == 50_256
    assert 50_256 not in document.tolist()[:-1]
    assert found.fast.decode(document.tolist()[:-1]) == "Hello world, hello\n\n<|endoftext|>"


def test_the_end_is_as_named(tmp_path: Path) -> None:
    fast = FastTokenizer(models.BPE(vocab={"a": 0, "b": 1, "<stop>": 2, "<eot>": 3}, merges=[]))
    fast.add_special_tokens([AddedToken("<stop>", special=True), AddedToken("<eot>", special=True)])
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"nothing says which token ends a text; set task\.tokenizer\.end"):
        loaded(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert loaded(tmp_path).end_id == 2
    assert loaded(tmp_path, end="<eot>").end_id == 3
    with pytest.raises(DataError, match=r"no token '<eos>' to end a text.*Did you mean '<eot>'\?"):
        loaded(tmp_path, end="<eos>")


def test_what_runs_code_or_is_broken_is_refused(tmp_path: Path, trained: RunTokenizer) -> None:
    with pytest.raises(DataError, match=r"holds no tokenizer: expected tokenizer\.json"):
        loaded(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{broken")
    with pytest.raises(DataError, match=r"tokenizer\.json: .*expected a tokenizer\.json"):
        loaded(tmp_path)
    trained.fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["x.Y", None]}})
    )
    with pytest.raises(DataError, match="auto_map"):
        loaded(tmp_path)


def test_without_a_network_a_name_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DataError, match="run `hf download lab/nowhere --local-dir DIRECTORY`"):
        load_tokenizer("lab/nowhere", None)
    with pytest.raises(DataError, match="does not exist; give a path that does, or OWNER/NAME"):
        load_tokenizer(str(tmp_path / "nowhere"), None)
