"""The task families by name: the one place where a plan's task becomes code.

A family's module is imported only when it is asked for, so a program without torch can use this registry
for a task that needs none. A user's own task (`task.name=custom`) is imported only if its target is among
those that the owner of this machine has allowed; a plan from elsewhere cannot name code to run. It is looked
for where Python looks, and then in the working directory.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection, Mapping
from typing import Final, cast

from manyhands.errors import PlanError
from manyhands.plan.safety import check_allowed
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import CustomTask
from manyhands.tasks.protocol import ChecksPlan, TaskFamily

FAMILIES: Final[Mapping[str, str]] = {
    "language_model": "manyhands.tasks.language_model:FAMILY",
    "grids": "manyhands.tasks.grids:FAMILY",
    "chess_endgames": "manyhands.tasks.chess_endgames.task:FAMILY",
    "tabular": "manyhands.tasks.tabular:FAMILY",
    "survival": "manyhands.tasks.survival:FAMILY",
    "dummy": "manyhands.tasks.dummy:FAMILY",
}
"""name -> module:object, where object is a TaskFamily."""


def family_of(plan: Plan, *, allowed: Collection[str] = ()) -> TaskFamily:
    """The family of a plan's task; with `data.shards`, one whose samples come from there.

    `allowed`: targets of custom tasks that may be imported here. Raises PlanError for any other and
    for a target that cannot be imported or is no TaskFamily.
    """
    family = _own_family(plan, allowed)
    if plan.data.shards is None:
        return family
    from manyhands.tasks.sharded import ShardedFamily  # it loads torch

    return ShardedFamily(family)


def _own_family(plan: Plan, allowed: Collection[str]) -> TaskFamily:
    task = plan.task
    if not isinstance(task, CustomTask):
        return _load(FAMILIES[task.name])
    check_allowed(task, allowed)
    _look_here_too()
    return _load(task.target)


def check_task(plan: Plan) -> None:
    """Let the family of a task that is ours look at its settings, before anything is read. Raises PlanError."""
    family = None if isinstance(plan.task, CustomTask) else family_of(plan)
    if isinstance(family, ChecksPlan):
        family.check(plan)


def _look_here_too() -> None:
    """A task of one's own may lie in the working directory, which an installed command does not search by itself."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)


def _load(target: str) -> TaskFamily:
    module_name, _, attribute = target.partition(":")
    try:
        family = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"task target {target!r}: {error}; give module:object that Python can import, from where its file lies "
            f"(here: {os.getcwd()}) or installed"
        ) from error
    if isinstance(family, type) or not all(
        callable(getattr(family, name, None)) for name in ("prepare", "open")
    ):
        raise PlanError(
            f"task target {target!r} is a {type(family).__name__}: an object with prepare(plan, directory) and "
            "open(plan, materials) is expected (tasks/protocol.py, TaskFamily)"
        )
    return cast(TaskFamily, family)
