"""What of this machine a training on a host needs: files that its plan names, and the code of a task of one's own.

A path in the plan that exists here is sent, and is relative to the run's directory in the plan that goes with it; one
that does not is a path of the host. Shards are not small: where they lie on the host is said by data.shards, and of
the task that they were made of only what its model needs is read, hence sent.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from manyhands.errors import PlanError
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import MODEL_SETTINGS, CustomTask

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
    """`plan`: with the paths as the host has them. `elsewhere`: paths in it that must exist on the host."""

    plan: Plan
    files: tuple[Sent, ...]
    elsewhere: tuple[str, ...]


def inputs_of(plan: Plan, allowed: Sequence[str] = ()) -> Inputs:
    """What to send. Raises PlanError for more than LARGEST_BYTES, and for code that is not found."""
    data = plan.model_dump(mode="json")
    files: list[Sent] = []
    elsewhere: list[str] = []
    read = data["task"]
    if plan.data.shards is not None:
        read = {key: read[key] for key in MODEL_SETTINGS.get(plan.task.name, ()) if key in read}
    for holder, key, value in list(_paths(read, "")):
        here = Path(value).expanduser()
        if here.exists():
            name = f"{INPUTS}/{len({Path(f.name).parts[1] for f in files}):02}-{here.resolve().name}"
            files += [Sent(file=file, name=f"{name}{tail}") for file, tail in _files(here)]
            holder[key] = name
        elif value.startswith(("/", "~")):
            elsewhere.append(value)
    data["task"] |= read
    size = sum(sent.file.stat().st_size for sent in files)
    if size > LARGEST_BYTES:
        raise PlanError(
            f"the files that the plan names are {size / 2**30:.1f} GiB: more than {LARGEST_BYTES / 2**30:g} GiB is "
            "not sent with a training; put them on the host, and give their path there, one that does not exist here"
        )
    if isinstance(plan.task, CustomTask) and plan.task.target in allowed:
        files += _code(plan.task.target)
    return Inputs(plan=resolve(data, where="plan"), files=tuple(files), elsewhere=tuple(elsewhere))


def _paths(value: Any, name: str) -> Iterator[tuple[Any, Any, str]]:
    """Each text that is a path by its name, with what holds it and under which key."""
    items: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(value, dict):
        items = iter(value.items())
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for key, part in items:
        called = key if isinstance(key, str) else name
        if isinstance(part, str) and part:
            if called.rpartition("_")[2] in _NAMES_OF_PATHS:
                yield value, key, part
        else:
            yield from _paths(part, called)


def _files(path: Path) -> list[tuple[Path, str]]:
    if path.is_file():
        return [(path, "")]
    found = sorted(file for file in path.rglob("*") if file.is_file())
    return [(file, "/" + file.relative_to(path).as_posix()) for file in found]


def _code(target: str) -> list[Sent]:
    """The module of a task, or the package that it is in; not what is installed, which the host has as well."""
    root = target.partition(":")[0].partition(".")[0]
    here = Path.cwd()
    if (here / f"{root}.py").is_file():
        return [Sent(file=here / f"{root}.py", name=f"{CODE}/{root}.py")]
    package = here / root
    if not package.is_dir():
        spec = importlib.util.find_spec(root)
        if spec is None or spec.origin is None:
            raise PlanError(
                f"task target {target!r}: there is no {root}.py here ({here}): run this where it lies, so that it "
                "can be sent to the host"
            )
        if spec.submodule_search_locations is None:
            return [Sent(file=Path(spec.origin), name=f"{CODE}/{root}.py")]
        package = Path(spec.origin).parent
    files = sorted(f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts)
    return [
        Sent(file=f, name=f"{CODE}/{root}/{f.relative_to(package).as_posix()}")
        for f in files
        if os.access(f, os.R_OK)
    ]
