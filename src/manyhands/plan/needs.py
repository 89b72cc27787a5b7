"""What a plan needs of the machine that carries it out, beyond manyhands itself: optional packages, and files.

One list, asked before anything starts: of this machine by `manyhands train`, of another by `train --host`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final, get_args

from manyhands.config import PATH, LocalPath, Settings
from manyhands.config.extras import missing
from manyhands.plan.chess_endgames import ChessEndgamesTask
from manyhands.plan.fine_tuning import FineTuned
from manyhands.plan.language_model import LanguageModelTask
from manyhands.plan.schema import Plan

WORDS: Final = ("stdlib", "generated")
"""What stands in the place of a path where nothing is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """`module`: what is imported. `option`: what asks for it."""

    module: str
    extra: str
    option: str


def packages_of(plan: Plan) -> tuple[Package, ...]:
    """What must be installed beside manyhands' own requirements, the same module once."""
    task, found = plan.task, []
    if isinstance(task, FineTuned) and task.adapter is not None:
        found.append(Package(module="peft", extra="lora", option="task.adapter"))
    if plan.data.shards is not None:
        found.append(Package(module="pyarrow", extra="shards", option="data.shards"))
    elif isinstance(task, ChessEndgamesTask) and task.syzygy is not None and _probes(task.pieces):
        found.append(Package(module="chess", extra="chess", option=f"task.pieces={task.pieces}"))
    elif isinstance(task, LanguageModelTask) and task.text.kind == "parquet":
        found.append(Package(module="pyarrow", extra="hub", option="task.text.kind=parquet"))
    elif isinstance(task, LanguageModelTask) and task.text.kind == "hub":
        found.append(Package(module="datasets", extra="hub", option="task.text.kind=hub"))
    return tuple(found)


def check_installed(packages: Iterable[Package]) -> None:
    """Raises MissingExtra for the first that this Python does not have. Nothing is imported."""
    for package in packages:
        if find_spec(package.module) is None:
            raise missing(package.module, extra=package.extra, option=package.option)


def paths_of(settings: Settings) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Each text that the schema says is a path, as it stands, with where it stands."""
    for name, field in type(settings).model_fields.items():
        marked = PATH in field.metadata or _marked(field.annotation)
        yield from _paths(getattr(settings, name), marked, (name,))


def _paths(
    value: Any, marked: bool, at: tuple[str | int, ...]
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    if isinstance(value, Settings):
        yield from ((at + below, path) for below, path in paths_of(value))
    elif isinstance(value, tuple):
        for number, part in enumerate(value):
            yield from _paths(part, marked, (*at, number))
    elif marked and isinstance(value, str) and value not in WORDS:
        yield at, value


def _marked(annotation: Any) -> bool:
    """Whether a path is meant, or a tuple of paths, or nothing instead of one."""
    return annotation is LocalPath or any(_marked(part) for part in get_args(annotation))


def _probes(pieces: str) -> bool:
    """Whether tables are probed, not only decoded: where en passant may be possible, or for more than four men."""
    endings = (ending.partition(":")[0] for ending in pieces.split(","))
    return any(("P" in ending and "p" in ending) or len(ending.strip()) > 4 for ending in endings)
