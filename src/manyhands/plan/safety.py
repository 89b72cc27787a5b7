"""A plan is plain data. Whatever would make a reader of it run code, or look something up, is refused.

Holds for plan files and for plans from the wire alike: Hydra's `_target_`, interpolations, YAML tags
(resolve.py), and those keys of a transformers configuration that fetch and run somebody's code.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from manyhands.config import shown
from manyhands.errors import PlanError
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import CustomTask

MAX_DEPTH: Final = 32
MAX_VALUES: Final = 20_000
_MAGIC_KEY = re.compile(r"_[a-z]+_")
_CODE_KEYS: Final = frozenset(
    {"auto_map", "trust_remote_code", "custom_pipelines", "custom_generate", "use_kernels"}
)
_TELL: Final = "A plan is plain data: remove it."


def refuse_code(data: Any, where: str) -> None:
    """Raises PlanError when plain data names code to run, holds an interpolation, or is too deep or too
    large."""
    count = 0
    stack: list[tuple[Any, str, int]] = [(data, "", 0)]
    while stack:
        value, path, depth = stack.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_VALUES:
            raise PlanError(f"{where}: more than {MAX_VALUES} values or {MAX_DEPTH} levels: that is no plan.")
        if isinstance(value, Mapping):
            for key, item in value.items():
                inner = f"{path}.{key}".lstrip(".")
                _refuse_key(str(key), item, inner, where)
                stack.append((item, inner, depth + 1))
        elif isinstance(value, (list, tuple)):
            stack.extend((item, f"{path}.{i}", depth + 1) for i, item in enumerate(value))
        elif isinstance(value, str):
            _refuse_text(value, path, where)


def check_runnable(plan: Plan, allowed_targets: Collection[str] = ()) -> None:
    """What a server checks before it serves a plan, and a client before it works on one that somebody else wrote.

    Raises PlanError for data in shards, and when the plan names code to run: a custom task that this client's owner
    has not allowed by its full target, or anything that `refuse_code` finds.
    """
    refuse_code(plan.model_dump(), "plan")
    if plan.data.shards is not None:
        raise PlanError(
            f"'data.shards' is {shown(plan.data.shards)}: runs of several machines do not read shards yet; leave it "
            "out, or train on your own devices with `manyhands train`."
        )
    if isinstance(plan.task, CustomTask):
        check_allowed(plan.task, allowed_targets)


def check_allowed(task: CustomTask, allowed_targets: Collection[str]) -> None:
    """Raises PlanError for a task of somebody's own that was not allowed by its full name."""
    if task.target not in allowed_targets:
        allowed = ", ".join(sorted(allowed_targets)) or "none"
        raise PlanError(
            f"'task.target' is '{task.target}': the plan names code to run, which is not allowed here (allowed: "
            f"{allowed}). Read that code, and if you trust it, start again with --allow-task {task.target}"
        )


def _refuse_key(key: str, value: Any, path: str, where: str) -> None:
    if _MAGIC_KEY.fullmatch(key) or (key in _CODE_KEYS and value not in (None, False)):
        raise PlanError(f"{where}: '{path}' is {shown(value)}: this names code to run. {_TELL}")
    # transformers takes "owner/repository" here as a kernel to download and run
    if key.endswith("_implementation") and "/" in str(value):
        raise PlanError(f"{where}: '{path}' is {shown(value)}: this names code to fetch and run. {_TELL}")


def _refuse_text(value: str, path: str, where: str) -> None:
    if "${" in value:
        raise PlanError(
            f"{where}: '{path}' is {shown(value)}: an interpolation. A plan is plain data: write the value."
        )
    if value.lstrip().startswith("!!"):
        raise PlanError(f"{where}: '{path}' is {shown(value)}: a tag that names code to run. {_TELL}")
