from __future__ import annotations

from typing import Any

import pytest
import torch

from manyhands.errors import PlanError
from manyhands.plan.tasks import LanguageModelTask
from manyhands.tasks.causal_models import context_of
from manyhands.tasks.model_configuration import (
    build_model,
    causal_configuration,
    check_causal,
    model_configuration,
)

LLAMA = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def configuration(**settings: Any) -> dict[str, Any]:
    task = LanguageModelTask(**{"block_size": 16} | settings)
    return model_configuration(task, vocabulary_size=50, end_id=3)


def test_the_rest_is_filled_in() -> None:
    found = configuration(model={"n_layer": 1, "n_head": 2, "n_embd": 16})
    assert (found["vocab_size"], found["n_positions"], found["eos_token_id"], found["bos_token_id"]) == (
        50,
        16,
        3,
        3,
    )
    assert (found["resid_pdrop"], found["embd_pdrop"], found["attn_pdrop"]) == (0.0, 0.0, 0.0)
    assert found["activation_function"] == "gelu"


def test_what_the_plan_says_wins() -> None:
    found = configuration(
        model={"num_hidden_layers": 1, "n_head": 2, "n_embd": 16, "resid_pdrop": 0.1, "n_positions": 32}
        | {"activation_function": "gelu_new"}
    )
    assert (found["n_layer"], found["resid_pdrop"], found["n_positions"]) == (1, 0.1, 32)
    assert found["activation_function"] == "gelu_new"


@pytest.mark.parametrize(("model_type", "model"), [("llama", LLAMA), ("qwen3", LLAMA | {"head_dim": 8})])
def test_other_families_build_and_give_a_loss(model_type: str, model: dict[str, Any]) -> None:
    if model_type == "qwen3":
        model = model | {"num_key_value_heads": 2}
    found = configuration(model_type=model_type, model=model)
    assert found["max_position_embeddings"] == 16
    net = build_model(found)
    assert net.training
    logits = net(input_ids=torch.zeros(2, 16, dtype=torch.int64), use_cache=False).logits
    assert logits.shape == (2, 16, 50)
    assert {p.dtype for p in net.parameters()} == {torch.float32}


ENCODER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "camembert": ENCODER,
    "data2vec-text": ENCODER,
    "modernbert-decoder": ENCODER,
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "xlm-roberta": ENCODER,
    "xlm-roberta-xl": ENCODER,
    "xmod": ENCODER,
    "prophetnet": {
        "hidden_size": 32,
        "num_decoder_layers": 1,
        "num_decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
    }
    | {"num_encoder_attention_heads": 2},
    "reformer": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "attention_head_size": 16,
        "feed_forward_size": 32,
    }
    | {"attn_layers": ["local", "lsh"]},
    "whisper": {
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "encoder_attention_heads": 2,
    }
    | {"decoder_ffn_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2},
    "xlm": {"emb_dim": 32, "n_layers": 1, "n_heads": 2},
    "xlnet": {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32, "d_head": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_other_forms_learn_every_token_looking_back(family: str) -> None:
    found = configuration(model_type=family, model=FAMILIES[family])
    torch.manual_seed(0)
    net = build_model(found)
    check_causal(net, found)
    tokens = torch.stack([torch.arange(i, i + 16) % 50 for i in range(50)])  # each token at each of 16 places
    logits = net(input_ids=tokens, use_cache=False).logits
    assert logits.shape == (50, 16, 50)
    (logits.float() * torch.randn(logits.shape)).sum().backward()
    learned = net.get_input_embeddings().weight.grad  # type: ignore[operator]
    assert (learned.abs().sum(1) > 0).all()
    context = context_of(causal_configuration(found, "test"))
    assert context == (None if family in ("bloom", "xlnet") else 16)


def test_a_model_with_existing_padding_has_fewer_places() -> None:
    assert (
        context_of(causal_configuration({"model_type": "roberta", "max_position_embeddings": 514}, "test"))
        == 512
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "reformer", "block_size": 100, "model": FAMILIES["reformer"]},
            "100 is no multiple of 64",
        ),
        (
            {"model_type": "gemma3", "model": {}},
            "'gemma3' is of text and more: use its part for text, 'gemma3_text'",
        ),
        ({"model": {"n_layers": 2}}, r"unknown key 'task\.model\.n_layers' .* Did you mean 'n_layer'\?"),
        ({"model": {"zzz": 2}}, r"Known keys: .*n_layer"),
        ({"model": {"n_layer": "two"}}, r"n_layer"),
        ({"model": {"vocab_size": 9}}, r"vocab_size is filled in"),
        ({"model": {"n_positions": 8}}, r"n_positions is 8, less than task\.block_size 16"),
        ({"model": {"max_position_embeddings": 8}}, r"max_position_embeddings is 8, less than"),
        ({"model_type": "nonesuch"}, r"'nonesuch' is not one that transformers knows"),
        ({"model_type": "llama"}, r"unknown key 'task\.model\.n_layer' for model_type 'llama'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        configuration(**settings)


def test_values_that_no_model_can_have_are_refused() -> None:
    with pytest.raises(PlanError, match="gpt2"):
        build_model(configuration(model={"n_layer": 1, "n_head": 3, "n_embd": 16}))
    with pytest.raises(PlanError, match="is no causal language model"):
        build_model(configuration(model_type="vit", model={}))
