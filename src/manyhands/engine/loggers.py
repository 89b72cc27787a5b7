"""Where events go beside events.jsonl: tensorboard and Weights & Biases, both optional parts.

Each has a thread of its own, so that no step waits for a disk or a network. One that fails ends alone: an event of
kind `warning` says so once, and the training goes on without it.
"""

from __future__ import annotations

import os
import queue
import secrets
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from manyhands.config.extras import optional
from manyhands.engine.events import Event, Events
from manyhands.engine.settings import Logging
from manyhands.errors import ManyhandsError
from manyhands.plan.schema import Plan

_FIGURES: Final = (
    "loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_s",
    "mfu",
    "memory_bytes",
    "skipped",
)
_WAITING_EVENTS: Final = 10_000
"""More than that behind, a logger is given up: it would take the memory of the training."""
_CLOSING_S: Final = 30.0
_STARTING_S: Final = 60.0
"""So long wandb may take to reach its server; a process that ends earlier waits for that."""
_FLUSH_S: Final = 10
"""Between two writes of tensorboard to its file."""
_PNG_SIZE: Final = slice(16, 24)
"""Where a PNG has its width and height, as two big-endian uint32."""


class Logger(Protocol):
    """Takes events, in the thread that made it."""

    def write(self, event: Event) -> None: ...

    def close(self) -> None: ...


@contextmanager
def logging_to(events: Events, logging: Logging, plan: Plan, directory: Path) -> Iterator[None]:
    """Let `events` go also to the loggers that the settings ask for, until the end of the context.

    Raises MissingExtra, naming the extra, where a package is not there, and ManyhandsError without a key for wandb.
    """
    makers: dict[str, Callable[[], Logger]] = {}
    if logging.tensorboard:
        makers["tensorboard"] = _Tensorboard.maker(directory)
    if logging.wandb_project is not None:
        makers["wandb"] = _Wandb.maker(logging, plan, directory)
    with ExitStack() as stack:
        for name, make in makers.items():
            aside = Aside(name, make, lambda text: events.emit("warning", text=text))
            stack.callback(aside.close)
            events.add(aside)
        yield


class Aside:
    """A sink that hands events to a logger in a thread; `tell` hears once why it has ended early.

    An event is dropped after that; nothing is raised, and no call waits.
    """

    def __init__(self, name: str, make: Callable[[], Logger], tell: Callable[[str], None]) -> None:
        self._name, self._make, self._tell = name, make, tell
        self._events: queue.Queue[Event | None] = queue.Queue(_WAITING_EVENTS)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __call__(self, event: Event) -> None:
        if self._ended:
            return
        self._put(event)

    def close(self, within_s: float = _CLOSING_S) -> None:
        """Wait until it has written everything, but not for ever."""
        if self._ended:
            return
        self._put(None)
        self._thread.join(within_s)
        if self._thread.is_alive():
            self._end(f"it has not written everything {within_s:g} s after the end")

    def _put(self, event: Event | None) -> None:
        try:
            self._events.put_nowait(event)
        except queue.Full:
            self._end(f"it is {_WAITING_EVENTS} events behind")

    def _run(self) -> None:
        try:
            logger = self._make()
            while (event := self._events.get()) is not None:
                logger.write(event)
            logger.close()
        except Exception as error:  # noqa: BLE001 - a training does not end because of its logger
            first = str(error).strip().split("\n")[0][:300]
            self._end(f"{type(error).__name__}: {first}")

    def _end(self, why: str) -> None:
        if not self._ended:
            self._ended = True
            self._tell(f"{self._name} has failed and gets nothing more ({_without_secrets(why)})")


def _without_secrets(text: str) -> str:
    key = os.environ.get("WANDB_API_KEY")
    return text.replace(key, "***") if key else text


def figures(event: Event) -> dict[str, float]:
    """The numbers of an event worth a curve, named <set or training>/<figure>."""
    if event["kind"] == "step":
        parts = (event.get("losses") or {}).items()
        named = {f"training/{name}": event.get(name) for name in _FIGURES}
        named |= {f"training/{name}_loss": value for name, value in parts}
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


# ------------------------------------------------------------------------------------------- tensorboard
class _Tensorboard:
    """Event files in <directory>/tensorboard: scalars, and pictures as the PNGs that they are."""

    def __init__(self, directory: Path, writing: Any, event: Any, summary: Any) -> None:
        self._event, self._summary = event, summary
        self._writer = writing.EventFileWriter(str(directory), flush_secs=_FLUSH_S)

    @classmethod
    def maker(cls, directory: Path) -> Callable[[], Logger]:
        modules = [
            optional(f"tensorboard.{name}", extra="tensorboard", option="logging.tensorboard")
            for name in (
                "summary.writer.event_file_writer",
                "compat.proto.event_pb2",
                "compat.proto.summary_pb2",
            )
        ]
        return lambda: cls(directory / "tensorboard", *modules)

    def write(self, event: Event) -> None:
        if event["kind"] == "resumed":  # what was written of later steps is out of date
            self._add(event, event["step"] + 1, session_log=self._event.SessionLog(status="START"))
            return
        summary = self._summary.Summary
        values = [summary.Value(tag=tag, simple_value=value) for tag, value in figures(event).items()]
        if event.get("picture"):
            png = Path(event["picture"]).read_bytes()
            width, height = struct.unpack(">II", png[_PNG_SIZE])
            image = summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
            values.append(summary.Value(tag=f"{event['set']}/predictions", image=image))
        if values:
            self._add(event, event["step"], summary=summary(value=values))
        if event["kind"] == "evaluation":
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, event: Event, step: int, **what: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=event["time_ms"] / 1000, step=step, **what))


# ------------------------------------------------------------------------------------------- Weights & Biases
class _Wandb:
    """A run there. Its id is kept in <directory>/wandb-run-id, so that a training that resumes goes on in it."""

    def __init__(self, wandb: Any, logging: Logging, plan: Plan, directory: Path) -> None:
        self._wandb = wandb
        self._run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_run or directory.name,
            group=logging.wandb_group,
            entity=logging.wandb_entity,
            id=_run_id(directory / "wandb-run-id"),
            dir=str(directory),
            config=plan.model_dump(mode="json"),
            resume="allow",
            settings=_silent(wandb),
        )
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def maker(cls, logging: Logging, plan: Plan, directory: Path) -> Callable[[], Logger]:
        wandb: Any = optional("wandb", extra="wandb", option="logging.wandb_project")
        online = wandb.setup(_silent(wandb)).settings.mode in ("online", "shared")
        if online and not wandb.login(prompt=False, verify=False):
            raise ManyhandsError(
                "logging.wandb_project: there is no key for Weights & Biases on this machine; run `wandb login`, set "
                "WANDB_API_KEY, or set WANDB_MODE=offline"
            )
        return lambda: cls(wandb, logging, plan, directory)

    def write(self, event: Event) -> None:
        named: dict[str, Any] = dict(figures(event))
        if event.get("picture"):
            named[f"{event['set']}/predictions"] = self._wandb.Image(event["picture"])
        if named:
            self._run.log({**named, "step": event["step"]})

    def close(self) -> None:
        self._run.finish()


def _silent(wandb: Any) -> Any:
    """It writes nothing to the terminal and takes nothing from it: that is the live view's."""
    return wandb.Settings(silent=True, console="off", init_timeout=_STARTING_S)


def _run_id(file: Path) -> str:
    if not file.exists():
        file.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
