from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, RobertaConfig, RobertaForMaskedLM

from manyhands.data.tokens import open_tokens
from manyhands.errors import DataError, PlanError
from manyhands.plan.schema import Plan
from manyhands.tasks.causal_models import quietly
from manyhands.tasks.language_model import FAMILY

MakePlan = Callable[..., Plan]


def test_weights_architecture_and_tokenizer_are_the_existing_ones(
    tuning_plan: MakePlan, existing: Path, tmp_path: Path
) -> None:
    plan = tuning_plan()
    made = FAMILY.prepare(plan, tmp_path)
    first, before = load_file(made.first_weights), load_file(existing / "model.safetensors")
    assert first.keys() == before.keys()
    assert all(torch.equal(first[name], before[name]) for name in first)
    assert all(parameter.trainable for parameter in made.parameters)
    task = FAMILY.open(plan, tmp_path)
    model = task.build_model()
    assert [name for name, _ in model.named_parameters()] == [p.name for p in made.parameters]
    assert (
        open_tokens(tmp_path / "train.tokens").tolist()
        == open_tokens(existing.parent / "materials" / "train.tokens").tolist()
    )
    model.load_state_dict(first, strict=False)
    with quietly():
        theirs = AutoModelForCausalLM.from_pretrained(existing).eval()
    tokens = task.batch(np.arange(2))["tokens"][:, :-1]
    torch.testing.assert_close(model(input_ids=tokens).logits, theirs(input_ids=tokens).logits)


def test_a_model_that_was_made_to_fill_gaps_learns_to_look_back(
    tuning_plan: MakePlan, existing: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=18, pad_token_id=1,
    )  # fmt: skip
    with quietly():
        RobertaForMaskedLM(config).save_pretrained(tmp_path / "gaps")
    for file in existing.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "gaps")
    plan = tuning_plan(weights=str(tmp_path / "gaps"))
    made = FAMILY.prepare(plan, tmp_path / "materials")
    assert json.loads((tmp_path / "materials" / "model.json").read_text())["is_decoder"] is True
    before = load_file(tmp_path / "gaps" / "model.safetensors")
    first = load_file(made.first_weights)
    assert all(torch.equal(first[name], before[name]) for name in first)
    task = FAMILY.open(plan, tmp_path / "materials")
    assert task.loss(task.build_model(), task.batch(np.arange(2))).mean.isfinite()
    with pytest.raises(PlanError, match=r"task\.block_size is 17, .* a context of 16 tokens"):
        FAMILY.prepare(tuning_plan(weights=str(tmp_path / "gaps"), block_size=17), tmp_path / "longer")
    file = tmp_path / "gaps" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": None}))
    FAMILY.prepare(plan, tmp_path / "without padding")


def test_weights_of_another_dtype_are_widened(tuning_plan: MakePlan, existing: Path, tmp_path: Path) -> None:
    other = shutil.copytree(existing, tmp_path / "half")
    weights = {n: t.bfloat16() for n, t in load_file(existing / "model.safetensors").items()}
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    made = FAMILY.prepare(tuning_plan(weights=str(other)), tmp_path / "materials")
    first = load_file(made.first_weights)
    assert all(t.dtype == torch.float32 and torch.equal(t, weights[n].float()) for n, t in first.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "x.Y"}}, r"auto_map.*never run here"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"model_type": "vit"}, "no causal language model"),
        ({"vocab_size": None}, r"config\.json.*'vocab_size' expected int"),
        ({"vocab_size": 10}, r"the tokenizer has 300 tokens.*knows 10"),
        ({"n_layer": 2}, r"missing keys of model_type 'gpt2', as 'transformer\.h\.1"),
        ({"n_embd": 32}, "fetch"),
    ],
)
def test_what_does_not_fit_is_refused(
    tuning_plan: MakePlan, existing: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = shutil.copytree(existing, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((DataError, PlanError), match=message):
        FAMILY.prepare(tuning_plan(weights=str(other)), tmp_path / "materials")


def test_an_adapter_of_itself_is_refused(tuning_plan: MakePlan, existing: Path, tmp_path: Path) -> None:
    other = tmp_path / "adapter"
    other.mkdir()
    for file in existing.glob("tokenizer*"):
        shutil.copy(file, other)
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(other)}))
    with pytest.raises(DataError, match="is its own base; give whole weights"):
        FAMILY.prepare(tuning_plan(weights=str(other)), tmp_path / "materials")


def test_a_longer_block_than_the_context(tuning_plan: MakePlan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"task\.block_size is 17, and the model .* a context of 16 tokens"):
        FAMILY.prepare(tuning_plan(block_size=17), tmp_path)


def test_files_that_are_missing_or_pickled(tuning_plan: MakePlan, existing: Path, tmp_path: Path) -> None:
    other = shutil.copytree(existing, tmp_path / "other")
    whole = (other / "model.safetensors").read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            FAMILY.prepare(tuning_plan(weights=str(other)), tmp_path / "materials")

    (other / "model.safetensors").write_bytes(whole[:-1])
    refused("fetch the weights again")
    (other / "model.safetensors").unlink()
    refused(r"has no \*\.safetensors")
    (other / "pytorch_model.bin").write_bytes(b"")
    refused(r"as a pickle, which can run code.*save_pretrained\(\)")
    (other / "config.json").unlink()
    refused(r"has no config\.json")
