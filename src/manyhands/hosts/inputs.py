"""What of this machine a training on a host needs: files that its plan names, and the code of a task of one's own.

A path in the plan that exists here is sent, and is relative to the run's directory in the plan that goes with it; one
that does not is a path of the host, and so is one with more than is sent. Shards are not small: where they lie on the
host is said by data.shards, and of the task that they were made of only what its model needs is read, hence sent.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manyhands.errors import DataError, PlanError
from manyhands.plan.needs import paths_of
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import MODEL_SETTINGS, ChessEndgamesTask, CustomTask
from manyhands.tasks.chess_endgames.pieces import needed_tables, parse

INPUTS: Final = "inputs"
CODE: Final = "code"
LARGEST_BYTES: Final = 1 << 30
_NAMES_OF_PATHS: Final = ("path", "file", "files", "directory", "dir", "weights", "syzygy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A file of this machine, and where it goes below the run's directory."""

    file: Path
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """`plan`: with the paths as the host has them. `elsewhere`: paths in it that must be on the host. `large`: those
    among them that are here too, and too large to be sent.
    """

    plan: Plan
    files: tuple[Sent, ...]
    elsewhere: tuple[str, ...]
    large: tuple[str, ...] = ()


def inputs_of(plan: Plan, allowed: Sequence[str] = ()) -> Inputs:
    """What to send. Raises PlanError for code that is not found, DataError for files that cannot be read and for
    endings that no host can make positions of.
    """
    if isinstance(plan.task, ChessEndgamesTask) and plan.data.shards is None:
        _check_endgames(plan.task)
    data = plan.model_dump(mode="json")
    files: list[Sent] = []
    elsewhere: list[str] = []
    large: list[str] = []
    left_bytes, placed = LARGEST_BYTES, dict[Path, str]()
    for at, value in _paths(plan):
        here = Path(value).expanduser()
        if not here.exists():
            if value.startswith(("/", "~")):
                elsewhere.append(value)
            continue
        if here.resolve() in placed:
            _put(data["task"], at, placed[here.resolve()])
            continue
        found = _files(here, plan)
        size = sum(file.stat().st_size for file, _ in found)
        if size > left_bytes:
            large.append(os.path.abspath(here))
            _put(data["task"], at, large[-1])
            continue
        left_bytes -= size
        name = placed[here.resolve()] = f"{INPUTS}/{len(placed):02}-{here.resolve().name}"
        files += [Sent(file=file, name=f"{name}{tail}") for file, tail in found]
        _put(data["task"], at, name)
    if isinstance(plan.task, CustomTask) and plan.task.target in allowed:
        files += _code(plan.task.target)
    return Inputs(
        plan=resolve(data, where="plan"),
        files=tuple(files),
        elsewhere=(*elsewhere, *large),
        large=tuple(large),
    )


At = tuple[str | int, ...]


def _paths(plan: Plan) -> Iterator[tuple[At, str]]:
    """Each path of the task that is read by the training, and where it stands in the task."""
    if isinstance(plan.task, CustomTask):
        yield from _named_so(plan.task.settings, ("settings",))
        return
    only = None if plan.data.shards is None else MODEL_SETTINGS.get(plan.task.name, frozenset())
    yield from ((at, path) for at, path in paths_of(plan.task) if only is None or at[0] in only)


def _named_so(value: Any, at: At, called: str = "") -> Iterator[tuple[At, str]]:
    """Of the settings of a task of one's own, which nobody describes: each text that is a path by its name, or that
    has a / and exists here.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _named_so(part, (*at, key), key)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            yield from _named_so(part, (*at, number), called)
    elif (
        isinstance(value, str) and value and (called.rpartition("_")[2] in _NAMES_OF_PATHS or _is_here(value))
    ):
        yield at, value


def _is_here(text: str) -> bool:
    """A file or directory by a path of more than one part: a separator or a home is none."""
    path = Path(text).expanduser()
    return "/" in text.strip("/.~") and path.exists()


def _check_endgames(task: ChessEndgamesTask) -> None:
    """What the host would find wrong, before anything is sent; where the tables are its own, it looks itself."""
    from manyhands.tasks.chess_endgames.truth import check_source  # needs numpy, which a follower does not

    tables = None if task.syzygy is None else Path(task.syzygy).expanduser()
    if tables is None or tables.is_dir() or not tables.is_absolute():
        check_source(parse(task.pieces), tables)


def _put(data: Any, at: At, value: str) -> None:
    for key in at[:-1]:
        data = data[key]
    data[at[-1]] = value


def _files(path: Path, plan: Plan) -> list[tuple[Path, str]]:
    """The files to send of a path, and the end of their names; of Syzygy tables those that are needed."""
    if path.is_file():
        return [(path, "")]
    try:
        found = sorted(file for file in path.rglob("*") if file.is_file())
    except OSError as error:
        raise DataError(
            f"{path}, which the plan names: {error}; make it readable, or give another"
        ) from error
    if isinstance(plan.task, ChessEndgamesTask) and Path(plan.task.syzygy or "").expanduser() == path:
        needed = {name for ending in parse(plan.task.pieces).endings for name in needed_tables(ending)}
        found = [file for file in found if file.name in needed]
    return [(file, "/" + file.relative_to(path).as_posix()) for file in found]


def _code(target: str) -> list[Sent]:
    """The module of a task, or the package that it is in, and those beside it that these import, and so on.

    Not what is installed, which the host has as well.
    """
    root = target.partition(":")[0].partition(".")[0]
    place = _place_of(root, target)
    installed = place in {Path(path) for path in sysconfig.get_paths().values()}
    files: dict[Path, None] = {}
    waiting, seen = [root], {root}
    while waiting:
        for file in _files_of(waiting.pop(), place):
            files[file] = None
            found = _imported(file) - seen if file.suffix == ".py" and not installed else set()
            waiting += [name for name in sorted(found) if _files_of(name, place)]
            seen |= found
    return [Sent(file=f, name=f"{CODE}/{f.relative_to(place).as_posix()}") for f in files]


def _place_of(root: str, target: str) -> Path:
    """The directory in which a module or package lies: this one, or one of the path's."""
    here = Path.cwd()
    if (here / f"{root}.py").is_file() or (here / root).is_dir():
        return here
    spec = importlib.util.find_spec(root)
    if spec is None or spec.origin is None:
        raise PlanError(
            f"task target {target!r}: there is no {root}.py here ({here}): run this where it lies, so that it "
            "can be sent to the host"
        )
    module = Path(spec.origin)
    return module.parent if spec.submodule_search_locations is None else module.parent.parent


def _files_of(name: str, place: Path) -> list[Path]:
    """Of the module `name` in that directory, or of the package; none where there is neither."""
    module = place / f"{name}.py"
    if module.is_file():
        return [module]
    found = (f for f in sorted((place / name).rglob("*")) if f.is_file() and "__pycache__" not in f.parts)
    files = [f for f in found if os.access(f, os.R_OK)]
    return files if any(f.suffix == ".py" for f in files) else []


def _imported(file: Path) -> set[str]:
    """The first parts of the names of modules that a file imports, wherever in it; none of one that is no Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # its own check tells
        return set()
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    return {name.partition(".")[0] for name in names}
