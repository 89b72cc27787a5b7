from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyhands.errors import DataError, MissingExtra, PlanError
from manyhands.plan.choices import overlay
from manyhands.plan.fine_tuning import Adapter
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan
from manyhands.simulation import simulate
from manyhands.tasks.causal_models import quietly
from manyhands.tasks.language_model import FAMILY
from manyhands.tasks.protocol import Prepared, Task
from manyhands.tasks.sample import sample_text

peft = pytest.importorskip("peft")

MakePlan = Callable[..., Plan]
LORA = Adapter(rank=2, alpha=4)


@pytest.fixture(scope="module")
def prepared(tuning_plan: MakePlan, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Task]:
    plan = tuning_plan(adapter=LORA)
    directory = tmp_path_factory.mktemp("adapter")
    return FAMILY.prepare(plan, directory), FAMILY.open(plan, directory)


def test_only_the_adapter_is_trainable_and_the_base_is_the_existing_one(
    prepared: tuple[Prepared, Task], existing: Path
) -> None:
    made, task = prepared
    model = task.build_model()
    assert {p.name: p.trainable for p in made.parameters} == {
        name: parameter.requires_grad for name, parameter in model.named_parameters()
    }
    trainable = [p for p in made.parameters if p.trainable]
    assert trainable
    assert all(".lora_" in p.name and min(p.shape) == 2 for p in trainable)
    first = load_file(made.first_weights)
    model.load_state_dict(first, strict=False)
    with quietly():
        base = AutoModelForCausalLM.from_pretrained(existing)
    tokens = task.batch(np.arange(2))["tokens"][:, :-1]
    ours, theirs = model(input_ids=tokens).logits, base(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, msg="a new adapter changes nothing")


def trained_weights(made: Prepared) -> dict[str, torch.Tensor]:
    """As if trained: a new adapter is zero and would hide a mistake."""
    weights = load_file(made.first_weights)
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(t.shape, generator=generator) * 0.1 if ".lora_" in name else t
        for name, t in weights.items()
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own
def test_what_a_person_keeps_is_the_adapter_as_peft_loads_it(
    prepared: tuple[Prepared, Task], existing: Path, tmp_path: Path
) -> None:
    made, task = prepared
    weights = trained_weights(made)
    task.save_pretrained(weights, tmp_path / "kept")
    files = {file.name for file in (tmp_path / "kept").iterdir()}
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(math.prod(p.shape) for p in made.parameters if p.trainable) == sum(
        tensor.numel() for tensor in load_file(tmp_path / "kept" / "adapter_model.safetensors").values()
    )
    settings = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(existing)
    task.save_pretrained(weights, tmp_path / "again")
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "kept" / n).read_bytes() for n in files)

    model = task.build_model().eval()
    model.load_state_dict(weights, strict=False)
    tokens = task.batch(np.arange(2))["tokens"][:, :-1]
    with torch.no_grad(), quietly():
        ours = model(input_ids=tokens).logits
        base = AutoModelForCausalLM.from_pretrained(existing)
        assert not torch.allclose(ours, base(input_ids=tokens).logits)
        loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "kept"))
        torch.testing.assert_close(loaded(input_ids=tokens).logits, ours)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=tokens).logits, ours, rtol=1e-4, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "kept")) == 300


def test_a_sample_of_an_adapter(prepared: tuple[Prepared, Task], tmp_path: Path) -> None:
    made, task = prepared
    task.save_pretrained(trained_weights(made), tmp_path)
    text = sample_text(tmp_path, prompt="hands", tokens=5)
    assert text.startswith("hands")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    with pytest.raises(DataError, match="base_model_name_or_path"):
        sample_text(tmp_path, prompt="hands", tokens=5)


def test_without_peft_the_extra_is_named(
    tuning_plan: MakePlan, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtra, match=r"task\.adapter needs.*pip install 'manyhands\[lora\]'"):
        FAMILY.prepare(tuning_plan(adapter=LORA), tmp_path)


def test_an_adapter_is_gone_on_from_as_other_weights_are(
    tuning_plan: MakePlan, prepared: tuple[Prepared, Task], tmp_path: Path
) -> None:
    made, task = prepared
    weights = trained_weights(made)
    task.save_pretrained(weights, tmp_path / "kept")
    for name, adapter in (("whole", None), ("again", LORA)):
        plan = tuning_plan(weights=str(tmp_path / "kept"), adapter=adapter)
        further = FAMILY.prepare(plan, tmp_path / name)
        model = FAMILY.open(plan, tmp_path / name).build_model()
        model.load_state_dict(load_file(further.first_weights), strict=False)
        adapted = task.build_model()
        adapted.load_state_dict(weights, strict=False)
        tokens = task.batch(np.arange(2))["tokens"][:, :-1]
        ours, theirs = model.eval()(input_ids=tokens).logits, adapted.eval()(input_ids=tokens).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_targets_are_as_named(tuning_plan: MakePlan, tmp_path: Path) -> None:
    made = FAMILY.prepare(tuning_plan(adapter=Adapter(rank=2, targets=("c_attn",))), tmp_path)
    assert {p.name.split(".lora_")[0] for p in made.parameters if p.trainable} == {
        "base_model.model.transformer.h.0.attn.c_attn"
    }
    with pytest.raises(PlanError, match=r"task\.adapter\.targets \['q_proj'\]"):
        FAMILY.prepare(tuning_plan(adapter=Adapter(targets=("q_proj",))), tmp_path)


@pytest.mark.parametrize("topology", ["star", "mesh"])
def test_a_run_of_two_clients_sends_the_adapter_alone(
    tuning_plan: MakePlan, prepared: tuple[Prepared, Task], topology: str
) -> None:
    data = tuning_plan(adapter=LORA).model_dump()
    data = overlay(
        data,
        {
            "preset": "diloco",
            "topology": topology,
            "local": {"steps": 10, "batch_size": 8, "optimizer": {"lr": 1e-2}},
            "rounds": {"total": 3},
            "outer": {"name": "nesterov", "momentum": 0.5},
        },
    )
    simulated = simulate(resolve(data), 2)
    assert simulated.state.phase == "finished"
    assert simulated.last_loss < simulated.first_loss - 0.05
    made, _ = prepared
    size = 4 * sum(math.prod(p.shape) for p in made.parameters if p.trainable)
    assert all(2 * size < result.update_bytes < 2 * size + 8192 for result in simulated.rounds)
    first = load_file(made.first_weights)
    for parameter in made.parameters:
        unchanged = torch.equal(simulated.weights[parameter.name], first[parameter.name])
        assert unchanged != parameter.trainable, parameter.name
