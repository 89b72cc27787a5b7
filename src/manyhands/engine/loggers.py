"""Where events go beside events.jsonl: tensorboard and Weights & Biases, both optional parts."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from manyhands.config.extras import optional
from manyhands.engine.events import Event, Sink
from manyhands.engine.settings import Logging
from manyhands.plan.schema import Plan

_FIGURES = ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu", "memory_bytes", "skipped")


def sinks_of(logging: Logging, plan: Plan, directory: Path) -> list[Sink]:
    """Those that the settings ask for. Raises MissingExtra, naming the extra, where a package is not there."""
    sinks: list[Sink] = []
    if logging.tensorboard:
        sinks.append(_Tensorboard(directory / "tensorboard"))
    if logging.wandb_project is not None:
        sinks.append(_Wandb(logging, plan, directory))
    return sinks


def figures(event: Event) -> dict[str, float]:
    """The numbers of an event worth a curve, named <set or training>/<figure>."""
    if event["kind"] == "step":
        named = {f"training/{name}": event.get(name) for name in _FIGURES}
    elif event["kind"] == "evaluation":
        metrics = {"loss": event["loss"], **event["metrics"]}
        named = {f"{event['set']}/{name}": value for name, value in metrics.items()}
    elif event["kind"] == "optimizer_stats":
        named = {
            f"optimizer/{key}/{name}": value
            for name, values in event["tensors"].items()
            for key, value in values.items()
        }
    else:
        named = {}
    return {name: float(value) for name, value in named.items() if value is not None}


class _Tensorboard:
    def __init__(self, directory: Path) -> None:
        module = optional("tensorboard.summary", extra="tensorboard", option="logging.tensorboard")
        self._writer = module.Writer(str(directory))
        atexit.register(self._writer.close)

    def __call__(self, event: Event) -> None:
        for name, value in figures(event).items():
            self._writer.add_scalar(name, value, step=event["step"])
        if event["kind"] in ("evaluation", "finished", "interrupted"):
            self._writer.flush()


class _Wandb:
    def __init__(self, logging: Logging, plan: Plan, directory: Path) -> None:
        wandb: Any = optional("wandb", extra="wandb", option="logging.wandb_project")
        self._wandb = wandb
        self._run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_run or directory.name,
            group=logging.wandb_group,
            entity=logging.wandb_entity,
            dir=str(directory),
            config=plan.model_dump(mode="json"),
            resume="allow",
        )

    def __call__(self, event: Event) -> None:
        named: dict[str, Any] = dict(figures(event))
        if event.get("picture"):
            named[f"{event['set']}/predictions"] = self._wandb.Image(event["picture"])
        if named:
            self._run.log({**named, "step": event["step"]})
        if event["kind"] in ("finished", "interrupted"):
            self._run.finish()
