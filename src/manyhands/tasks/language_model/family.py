"""How language models are prepared and opened.

`prepare` runs once per run: it writes the text's materials (materials.py), model.json and the first weights, random
or existing ones. `open` needs the materials and nothing else: a client never reads the text, and the weights come to
it in the run's snapshots, those that an adapter leaves frozen too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer

from manyhands.data.tokens import open_tokens, write_tokens
from manyhands.errors import DataError, PlanError
from manyhands.plan.language_model import LanguageModelTask
from manyhands.plan.schema import Plan
from manyhands.tasks.first_weights import FIRST_WEIGHTS, first_model, write_first_weights
from manyhands.tasks.language_model.existing_weights import (
    existing_configuration,
    load_existing,
    weights_directory,
)
from manyhands.tasks.language_model.materials import (
    SPLIT,
    TOKENIZER,
    TRAIN_TOKENS,
    VALIDATION_TOKENS,
    write_json,
    write_text_materials,
)
from manyhands.tasks.language_model.opened import LanguageModel
from manyhands.tasks.model_configuration import build_model, check_causal, check_model, model_configuration
from manyhands.tasks.protocol import Prepared, Task
from manyhands.tasks.received_configuration import check_received
from manyhands.tasks.tokenizer import RunTokenizer

MODEL = "model.json"


class LanguageModelFamily:
    """Implements tasks.protocol.TaskFamily."""

    def check(self, plan: Plan) -> None:
        """The model's keys, unless it comes with existing weights. Raises PlanError."""
        task = _settings(plan)
        if task.weights is None:
            check_model(task)

    def prepare(self, plan: Plan, directory: Path) -> Prepared:
        """Write materials and first weights into `directory`. Raises DataError for the text, a tokenizer or existing
        weights, PlanError for the model, MissingExtra.
        """
        self.check(plan)
        task = _settings(plan)
        if task.weights is not None:  # whose tokenizer it may be
            weights_directory(task.weights)
        directory.mkdir(parents=True, exist_ok=True)
        text = write_text_materials(task, directory)
        return self._with_model(
            plan, directory, text.samples, vocabulary_size=text.tokenizer.size, end_id=text.tokenizer.end_id
        )

    def without_data(self, plan: Plan, materials: Path, directory: Path) -> None:
        """The tokenizer, the record of the text, the model's description, and one sample of each side's tokens."""
        for name in (TOKENIZER, SPLIT, MODEL):
            shutil.copyfile(materials / name, directory / name)
        vocabulary_size = RunTokenizer(fast=_tokenizer(materials)).size
        for name in (TRAIN_TOKENS, VALIDATION_TOKENS):
            sample = open_tokens(materials / name)[: _settings(plan).block_size + 1]
            write_tokens(directory / name, [sample], vocabulary_size)

    def prepare_model(self, plan: Plan, directory: Path) -> Prepared:
        """Another model over the same tokens. Raises DataError for materials or existing weights, PlanError for the
        model, MissingExtra.
        """
        self.check(plan)
        size = RunTokenizer(fast=_tokenizer(directory)).size
        end_id = _configuration(directory)[
            "eos_token_id"
        ]  # of a tokenizer from elsewhere it stands here alone
        return self._with_model(plan, directory, 0, vocabulary_size=size, end_id=end_id)

    def _with_model(self, plan: Plan, directory: Path, samples: int, **tokens: int) -> Prepared:
        """Write the model's description and the first weights. `tokens`: vocabulary_size and end_id."""
        task = _settings(plan)
        existing = None if task.weights is None else weights_directory(task.weights)
        if existing is None:
            configuration = model_configuration(task, **tokens)
        else:
            configuration = existing_configuration(existing, block_size=task.block_size, **tokens)
        write_json(directory / MODEL, configuration)

        model = _first_model(configuration, plan, task, existing)
        materials = (TRAIN_TOKENS, VALIDATION_TOKENS, TOKENIZER, SPLIT, MODEL)
        return Prepared(
            materials={name: directory / name for name in materials},
            samples=samples,
            parameters=write_first_weights(model, directory),
            first_weights=directory / FIRST_WEIGHTS,
        )

    def open(self, plan: Plan, materials: Path) -> Task:
        """The task over materials that `prepare` wrote. Raises DataError if one is missing, not whole or not what the
        plan implies; PlanError if one names code.
        """
        settings = _settings(plan)
        configuration, tokenizer = _configuration(materials), _tokenizer(materials)
        check_received(
            configuration,
            settings,
            vocabulary_size=RunTokenizer(fast=tokenizer).size,
            where=MODEL,
            existing=settings.weights is not None,
        )
        return LanguageModel(
            block_size=settings.block_size,
            configuration=configuration,
            tokenizer=tokenizer,
            training=open_tokens(materials / TRAIN_TOKENS),
            validation=open_tokens(materials / VALIDATION_TOKENS),
            adapter=settings.adapter,
            base=_absolute(settings.weights),
            warnings=_left_out(materials) if settings.text.on_broken == "skip" else (),
        )


FAMILY = LanguageModelFamily()

_NAMED = 5
"""So many broken files are named in the warning; all are in the record."""


def _settings(plan: Plan) -> LanguageModelTask:
    if not isinstance(plan.task, LanguageModelTask):
        raise PlanError(f"task.name is {plan.task.name!r}, and this is the family of language_model")
    return plan.task


def _left_out(materials: Path) -> tuple[str, ...]:
    """A sentence where files or documents were skipped."""
    try:
        broken = json.loads((materials / SPLIT).read_text(encoding="utf-8"))["broken"]
        count, named = int(broken["count"]), [str(name) for name in broken["named"]]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    more = ", ..." if count > len(named[:_NAMED]) else ""
    text = (
        f"left out as broken (task.text.on_broken=skip): {count}, which are {', '.join(named[:_NAMED])}{more}"
    )
    return (text,) if count else ()


def _configuration(materials: Path) -> dict[str, Any]:
    """The model's. Raises DataError."""
    try:
        return dict(json.loads((materials / MODEL).read_text(encoding="utf-8")))
    except OSError as error:
        raise DataError(
            f"material {error.filename}: {error.strerror}; prepare or fetch the run's materials"
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(f"material {materials / MODEL}: {error}; fetch the run's materials again") from error


def _tokenizer(materials: Path) -> FastTokenizer:
    """Raises DataError."""
    try:
        return FastTokenizer.from_file(str(materials / TOKENIZER))
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(
            f"material {materials / TOKENIZER}: {error}; prepare the run's materials, or fetch them again"
        ) from error


def _absolute(weights: str | None) -> str | None:
    """A checkpoint outlives the working directory; a name on the Hub stays one."""
    if weights is None or not (path := Path(weights).expanduser()).exists():
        return weights
    return str(path.resolve())


def _first_model(
    configuration: dict[str, Any], plan: Plan, task: LanguageModelTask, existing: Path | None
) -> torch.nn.Module:
    """The model with its first weights: existing ones, or from the plan's seed, from which those of an adapter come
    too. The global generator is left as it was.
    """

    def make() -> torch.nn.Module:
        return build_model(configuration) if existing is None else load_existing(existing, configuration)

    model = first_model(make, plan.seed, task.adapter)
    check_causal(model, configuration)
    parameters = set(dict(model.named_parameters(remove_duplicate=False)))
    buffers = sorted(set(model.state_dict()) - parameters)
    if buffers and plan.buffers != "keep_local":
        raise PlanError(
            f"model_type {configuration['model_type']!r} has buffers that are part of its state ({buffers[0]}, "
            f"{len(buffers)} in all), and buffers is {plan.buffers!r}: use another model"
        )
    return model
