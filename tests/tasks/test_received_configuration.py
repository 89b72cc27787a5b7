from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyhands.errors import DataError, PlanError
from manyhands.plan.language_model import LanguageModelTask
from manyhands.tasks.language_model import FAMILY
from manyhands.tasks.model_configuration import model_configuration
from manyhands.tasks.received_configuration import check_received

TASK = LanguageModelTask(block_size=16, model={"num_hidden_layers": 1, "n_head": 2, "n_embd": 16})


def received(task: LanguageModelTask = TASK, **changes: Any) -> dict[str, Any]:
    """As it comes: through JSON, with the organizer's tokens."""
    configuration = json.loads(json.dumps(model_configuration(task, vocabulary_size=50, end_id=3)))
    return {**configuration, **changes}


def check(configuration: Any, task: LanguageModelTask = TASK, *, existing: bool = False) -> None:
    check_received(configuration, task, vocabulary_size=50, where="model.json", existing=existing)


def test_what_the_plan_implies_is_accepted() -> None:
    check(received())
    llama = LanguageModelTask(
        block_size=16,
        model_type="llama",
        model={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    check(received(llama), llama)


def test_a_model_that_is_to_look_back_does() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    bert = LanguageModelTask(block_size=16, model_type="roberta", model=sizes)
    check(received(bert), bert)
    for change in ({"is_decoder": False}, {"pad_token_id": 1}):
        with pytest.raises(DataError, match="this is not the model of this plan"):
            check(received(bert, **change), bert)


def test_defaults_of_another_version_are_the_senders_to_say() -> None:
    check(received(transformers_version="9.0", scale_attn_weights=False, something_new=1))


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil--model.Model"}},
        {"trust_remote_code": True},
        {"attn_implementation": "somebody/kernel"},
        {"nested": {"auto_map": {"AutoConfig": "evil.Config"}}},
        {"activation_function": {"_target_": "os.system"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_code_is_refused(changes: dict[str, Any], existing: bool) -> None:
    with pytest.raises(PlanError, match="names code"):
        check(received(**changes), existing=existing)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llama"},
        {"n_layer": 40},
        {"n_embd": 4096},
        {"vocab_size": 50_000},
        {"n_positions": 8},
        {"resid_pdrop": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_model_than_the_plans_is_refused(changes: dict[str, Any]) -> None:
    ((key, value),) = changes.items()
    with pytest.raises(DataError, match=f"'{key}' is {value!r}, and the plan makes it"):
        check(received(**changes))
    short = received()
    del short[key]
    with pytest.raises(DataError, match=f"'{key}' is None"):
        check(short)


def test_what_is_no_configuration_is_refused() -> None:
    with pytest.raises(DataError, match="is a JSON list"):
        check([1])


def test_a_task_is_not_opened_with_another_model(plan_for: Callable[..., Any], tmp_path: Path) -> None:
    plan = plan_for()
    FAMILY.prepare(plan, tmp_path)
    FAMILY.open(plan, tmp_path)
    file = tmp_path / "model.json"
    sound = json.loads(file.read_text())
    for change, error in (
        ({"auto_map": {"AutoConfig": "evil.Config"}}, PlanError),
        ({"n_layer": 9}, DataError),
    ):
        file.write_text(json.dumps({**sound, **change}))
        with pytest.raises(error, match=r"model\.json"):
            FAMILY.open(plan, tmp_path)
