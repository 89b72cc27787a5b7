"""A model's configuration that a client was sent (model.json), held against the plan before a model is made of it.

The plan is what the client has checked and agreed to; its materials are whatever bytes the server has named. What the
plan determines must be in them as it stands there, and nothing in them may name code to fetch or run. The rest, the
defaults of the server's version of transformers, is the configuration's own to say: that is what it is sent for.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import AutoConfig

from manyhands.errors import DataError
from manyhands.plan.language_model import LanguageModelTask
from manyhands.plan.safety import refuse_code
from manyhands.tasks.causal_models import context_key, defaults_of
from manyhands.tasks.model_configuration import model_configuration


def check_received(
    configuration: Any, task: LanguageModelTask, *, vocabulary_size: int, where: str, existing: bool = False
) -> None:
    """Raise PlanError where `configuration` names code, DataError where it is not the one that the plan implies.

    `existing`: the model is that of existing weights, of which the plan says no more than its name.
    """
    if not isinstance(configuration, dict):
        raise DataError(f"{where} is a JSON {type(configuration).__name__}; expected a model's configuration")
    refuse_code(configuration, where)
    if existing:
        return
    wanted = _implied(task, vocabulary_size)
    for key, value in wanted.items():
        if configuration.get(key) != value:
            raise DataError(
                f"{where}: '{key}' is {configuration.get(key)!r}, and the plan makes it {value!r}: this is not the "
                "model of this plan; ask the organizer of the run"
            )


def _implied(task: LanguageModelTask, vocabulary_size: int) -> dict[str, Any]:
    """What the plan determines of the configuration, by the names under which it is written."""
    complete = json.loads(json.dumps(model_configuration(task, vocabulary_size, end_id=0)))
    family = AutoConfig.for_model(task.model_type)
    keys = {
        "model_type",
        "vocab_size",
        "pad_token_id",
        context_key(family),
        *defaults_of(task.model_type, complete),
    }
    keys |= {*task.model, *(key for key in complete if "drop" in key)}
    written = sorted({family.attribute_map.get(key, key) for key in keys} & set(complete))
    return {key: complete[key] for key in written}
