"""Language-model tasks of the package lm-eval (extra: eval), on the model and tokenizer of a checkpoint.

Nothing is fetched where a task's data is on this machine: task files in a directory of one's own (`dataset_path:
json` with `data_files`) work offline, and HF_HUB_OFFLINE=1 holds for all of them. Task files may name functions to
run (`!function`): they are the user's own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch

from manyhands.config import did_you_mean
from manyhands.config.extras import optional
from manyhands.errors import DataError, PlanError
from manyhands.tasks.causal_models import context_of, quietly
from manyhands.tasks.language_model.saved import load_language_model, load_tokenizer

EXTRA: Final = "eval"
STDERR: Final = 2
UNLIMITED: Final = 2_048
"""So many tokens are looked at once by a model that would take any number; as lm-eval has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskScore:
    """One figure of one task. `filter`: how lm-eval read the answers; `stderr`: None where it is not defined."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    samples: int
    fewshot: int
    higher_is_better: bool | None


def run_tasks(
    checkpoint: Path,
    names: Sequence[str],
    *,
    device: torch.device,
    fewshot: int | None = None,
    seed: int = 1234,
    limit: int | None = None,
    include_path: Path | None = None,
    batch_size: int = 8,
) -> list[TaskScore]:
    """All figures of these tasks. `fewshot`, `seed`: how many examples are shown, and which; None: as the task says.
    `limit`: documents per task. `include_path`: a directory of task files, beside those of lm-eval.

    Raises MissingExtra, PlanError for a task that does not exist, DataError for data or a checkpoint that cannot be
    read.
    """
    with _quiet():
        tasks = _lm_eval("lm_eval.tasks")
        _lm_eval("accelerate")  # which lm-eval's models import, and lm-eval alone does not bring
        models, evaluator = _lm_eval("lm_eval.models.huggingface"), _lm_eval("lm_eval.evaluator")
        manager = _manager(tasks, names, include_path)
        model = load_language_model(checkpoint).to(device)
        tokenizer = load_tokenizer(checkpoint)
        wrapped = models.HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=context_of(model.config) or UNLIMITED,
            backend="causal",
        )
        try:
            found = evaluator.simple_evaluate(
                wrapped,
                tasks=list(names),
                num_fewshot=fewshot,
                limit=limit,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=1000,
                log_samples=False,
            )
        except Exception as error:  # lm-eval and datasets raise what they like, bare Exceptions among it
            raise DataError(_in_words(names, error)) from error
    return [score for name in found["results"] for score in _scores(found, name)]


def _lm_eval(module: str) -> ModuleType:
    return optional(module, extra=EXTRA, option="--tasks")


def _manager(tasks: ModuleType, names: Sequence[str], include_path: Path | None) -> Any:
    """Where these tasks are: the user's own files alone if all are there, since lm-eval's are thousands."""
    if include_path is not None:
        own = tasks.TaskManager(include_path=str(include_path), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    manager = tasks.TaskManager(include_path=None if include_path is None else str(include_path))
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks)
            raise PlanError(
                f"--tasks: there is no task {name!r}{'' if include_path is None else f' in {include_path}, or'} in "
                f"lm-eval.{near if 'Did' in near else ' lm-eval ls tasks lists them.'}"
            )
    return manager


def _scores(found: dict[str, Any], name: str) -> Iterator[TaskScore]:
    """lm-eval's keys are `metric,filter` and `metric_stderr,filter`."""
    figures = found["results"][name]
    better = found.get("higher_is_better", {}).get(name, {})
    for key, value in figures.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = figures.get(f"{metric}_stderr,{filter_}")
        yield TaskScore(
            task=name,
            metric=metric,
            filter=filter_,
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
            samples=int(found.get("n-samples", {}).get(name, {}).get("effective", 0)),
            fewshot=int(found.get("n-shot", {}).get(name, 0) or 0),
            higher_is_better=better.get(metric),
        )


def _in_words(names: Sequence[str], error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    return f"lm-eval on {', '.join(names)}: {reason}" + (
        "; HF_HUB_OFFLINE is set, so what is not on this machine yet cannot be had" if offline else ""
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and what it uses log and warn freely; figures are what is asked for. Its bars are for terminals."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), quietly(), _without_standard_error():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _without_standard_error() -> Iterator[None]:
    """Of this process and of the programs that it starts; as it is where that is a terminal."""
    if os.isatty(STDERR):
        yield
        return
    kept = os.dup(STDERR)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            os.dup2(nowhere.fileno(), STDERR)
            with contextlib.redirect_stderr(nowhere):
                yield
        finally:
            os.dup2(kept, STDERR)
            os.close(kept)
