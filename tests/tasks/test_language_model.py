from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyhands.data.tokens import open_tokens
from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import DummyTask, TextSource, Tokenizer
from manyhands.tasks.causal_models import quietly
from manyhands.tasks.language_model import FAMILY, LanguageModel
from manyhands.tasks.protocol import VALIDATION, Prepared, Task

MATERIALS = {"train.tokens", "validation.tokens", "tokenizer.json", "split.json", "model.json"}


@pytest.fixture(scope="module")
def prepared(
    plan_for: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Plan, Prepared, Path]:
    plan = plan_for("bpe")
    directory = tmp_path_factory.mktemp("prepared")
    return plan, FAMILY.prepare(plan, directory), directory


def test_materials_weights_and_table_belong_together(prepared: tuple[Plan, Prepared, Path]) -> None:
    plan, made, directory = prepared
    assert set(made.materials) == MATERIALS
    assert all(path == directory / name and path.is_file() for name, path in made.materials.items())
    weights = load_file(made.first_weights)
    assert {p.name: p.shape for p in made.parameters} == {n: tuple(t.shape) for n, t in weights.items()}
    assert all(t.dtype == torch.float32 for t in weights.values())
    assert "transformer.wte.weight" in weights
    assert "lm_head.weight" not in weights, "tied weights come once"
    task = FAMILY.open(plan, directory)
    assert task.samples() == made.samples
    assert [n for n, _ in task.build_model().named_parameters()] == [p.name for p in made.parameters]


def test_preparing_twice_gives_the_same_bytes(
    prepared: tuple[Plan, Prepared, Path], plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan, made, _ = prepared
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = FAMILY.prepare(plan, tmp_path)
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    for name in (*MATERIALS, made.first_weights.name):
        assert (tmp_path / name).read_bytes() == (made.first_weights.parent / name).read_bytes()
    assert again.parameters == made.parameters
    other = FAMILY.prepare(plan_for("bpe", seed=8), tmp_path / "other")
    assert other.first_weights.read_bytes() != made.first_weights.read_bytes()


def test_the_split_record_accounts_for_every_file(
    prepared: tuple[Plan, Prepared, Path], text_directory: Path
) -> None:
    _, made, directory = prepared
    record = json.loads(made.materials["split.json"].read_text())
    files = {f["path"]: f for part in ("training", "validation") for f in record[part]["files"]}
    assert set(files) == {p.name for p in text_directory.iterdir()}
    for name, file in files.items():
        data = (text_directory / name).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert record["training"]["tokens"] == len(open_tokens(directory / "train.tokens"))
    assert 0.1 < record["validation"]["bytes"] / sum(f["bytes"] for f in files.values()) < 0.4


def test_validation_text_is_not_in_the_training_tokens(prepared: tuple[Plan, Prepared, Path]) -> None:
    plan, made, directory = prepared
    task = FAMILY.open(plan, directory)
    assert isinstance(task, LanguageModel)
    record = json.loads(made.materials["split.json"].read_text())
    end = task.tokenizer.token_to_id("<|endoftext|>")
    for part, tokens in (("training", task.training), ("validation", task.validation)):
        assert int((np.asarray(tokens) == end).sum()) == record[part]["documents"]
        first = task.tokenizer.decode(np.asarray(tokens[: list(tokens).index(end)]).tolist())
        assert hashlib.sha256(first.encode()).hexdigest() == record[part]["files"][0]["sha256"]


def test_batches_and_loss(prepared: tuple[Plan, Prepared, Path]) -> None:
    plan, _, directory = prepared
    task: Task = FAMILY.open(plan, directory)
    batch = task.batch(np.array([0, 5]))
    tokens = batch["tokens"]
    assert tokens.shape == (2, 17)
    assert tokens.dtype == torch.int64
    assert tokens[1].tolist() == open_tokens(directory / "train.tokens")[80:97].tolist()
    other = task.batch(np.array([0]), VALIDATION)["tokens"]
    assert other[0].tolist() == open_tokens(directory / "validation.tokens")[:17].tolist()
    model = task.build_model()
    assert model.training
    loss = task.loss(model, batch)
    assert loss.count == 32
    logits = model(input_ids=tokens[:, :-1]).logits.double()
    expected = -F.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).mean()
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.mean.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.loss(model, batch).mean.dtype == torch.float32
    assert (task.unit, task.tokens_per_sample()) == ("tokens", 16)
    with pytest.raises(DataError, match="samples"):
        task.batch(np.array([task.samples()]))


@pytest.mark.parametrize("kind", ["byte", "character", "bpe"])
def test_what_a_person_keeps_loads_in_transformers(
    kind: str, plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_for(kind)
    FAMILY.prepare(plan, tmp_path / "materials")
    task = FAMILY.open(plan, tmp_path / "materials")
    assert isinstance(task, LanguageModel)
    model = task.build_model()
    task.save_pretrained(dict(model.named_parameters()), tmp_path / "kept")
    with quietly():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "kept", local_files_only=True)
    text = "naïve hands\n\nmake def f(x): €"
    assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text
    assert len(tokenizer) == loaded.config.vocab_size
    batch = task.batch(np.arange(3))
    with torch.no_grad():
        ours = model(input_ids=batch["tokens"][:, :-1]).logits
        theirs = loaded.eval()(input_ids=batch["tokens"][:, :-1]).logits
    torch.testing.assert_close(ours, theirs)


def test_opening_needs_every_material(prepared: tuple[Plan, Prepared, Path], tmp_path: Path) -> None:
    plan, made, _ = prepared
    for missing in sorted(MATERIALS - {"split.json"}):
        directory = tmp_path / missing
        directory.mkdir()
        for name, path in made.materials.items():
            if name != missing:
                (directory / name).write_bytes(path.read_bytes())
        with pytest.raises(DataError, match=missing.replace(".", r"\.")):
            FAMILY.open(plan, directory)
        (directory / missing).write_bytes(b"{broken")
        with pytest.raises(DataError, match=missing.replace(".", r"\.")):
            FAMILY.open(plan, directory)


def test_too_little_text_says_what_to_do(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hands " * 40)
    (tmp_path / "b.txt").write_text("light " * 20)
    source = TextSource(path=str(tmp_path), validation_share=0.4)
    with pytest.raises(DataError, match="the training part has 120 bytes of text, at least 201"):
        FAMILY.prepare(plan_for(block_size=200, text=source), tmp_path / "out")
    tokenizer = Tokenizer(kind="bpe", vocabulary_size=400)
    with pytest.raises(DataError, match=r"\d+ tokens for train.*make task.block_size smaller"):
        FAMILY.prepare(plan_for(block_size=100, text=source, tokenizer=tokenizer), tmp_path / "out")


def test_a_plan_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'dummy'"):
        FAMILY.prepare(Plan(task=DummyTask()), tmp_path)


def test_settings_reach_the_model(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    model: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8}
    made = FAMILY.prepare(plan_for(model=model), tmp_path)
    shapes = {p.name: p.shape for p in made.parameters}
    assert shapes["transformer.wpe.weight"] == (16, 8)
    assert "transformer.h.1.mlp.c_fc.weight" in shapes


BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def test_a_model_that_sees_what_it_predicts_is_refused(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'bert' sees the tokens that .*task\.model\.is_decoder=true"):
        FAMILY.prepare(
            plan_for("byte", model_type="bert", model=BERT | {"is_decoder": False}), tmp_path / "sees"
        )
    FAMILY.prepare(plan_for("byte", model_type="bert", model=BERT), tmp_path / "causal")


def test_a_model_that_does_not_compute_says_so_before_it_is_trained(
    plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_for("byte", model_type="qwen3", model=BERT | {"num_key_value_heads": 5, "head_dim": 8})
    with pytest.raises(PlanError, match=r"'qwen3' as task\.model describes it fails on 8 tokens"):
        FAMILY.prepare(plan, tmp_path)
