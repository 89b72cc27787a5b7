"""Which plan a command line means: a file, or a config that comes with manyhands, with KEY=VALUE on top."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from manyhands.plan.schema import Plan

_NOT_YET = {
    "rank": "processes that are started by hand",
    "world_size": "processes that are started by hand",
    "processes": "several processes on this machine",
}


def plan_from(where: str | None, overrides: Sequence[str], config_name: str = "train") -> Plan:
    """The plan of file `where`, or of the config named `where`, else of `config_name`. Raises PlanError.

    Raises a usage error for an argument that is no KEY=VALUE.
    """
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals and not key.startswith("~"):
            raise click.UsageError(f"'{text}' is not KEY=VALUE, as in local.steps=50")
        if key in _NOT_YET:
            raise click.UsageError(f"{text} is not available yet: {_NOT_YET[key]}. Leave it out to use one.")
    if where is None:
        from manyhands.plan.compose import compose

        return compose(overrides, config_name)
    if re.fullmatch(r"[a-z0-9_-]+", where) and not Path(where).exists():
        from manyhands.plan.compose import compose

        return compose(overrides, where)
    from manyhands.plan.resolve import load_plan

    return load_plan(where, overrides)
