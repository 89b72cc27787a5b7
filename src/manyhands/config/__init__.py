"""Typed settings and the places where manyhands keeps its files.

`Settings` is the base of every configuration object of the house: frozen, keyword-only, and unknown keys
are refused with the nearest match. Imported by programs that must start fast: nothing heavy here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Self

from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, ValidationError

from manyhands.config.faults import MISSING, did_you_mean, differences, explain, shown
from manyhands.errors import PlanError

__all__ = [
    "HOME_VARIABLE",
    "MISSING",
    "PATH",
    "LocalPath",
    "Settings",
    "did_you_mean",
    "differences",
    "explain",
    "home",
    "run_like",
    "runs_directory",
    "shown",
]

HOME_VARIABLE = "MANYHANDS_HOME"

PATH: Final = object()
LocalPath = Annotated[str, PATH]
"""A setting that is, or may be, the path of a file or directory: with a training that goes elsewhere it is sent."""


def home() -> Path:
    """MANYHANDS_HOME, else the platform's data directory. Not created here."""
    chosen = os.environ.get(HOME_VARIABLE)
    return Path(chosen).expanduser() if chosen else user_data_path("manyhands")


def runs_directory() -> Path:
    """Where what runs on this machine keeps its files, each by its name."""
    return home() / "runs"


def run_like(name: str) -> str:
    """` Did you mean 'x'?` for the run here whose name is the nearest, or which there are."""
    runs = runs_directory()
    return did_you_mean(name, [run.name for run in runs.iterdir() if run.is_dir()] if runs.is_dir() else [])


class Settings(BaseModel):
    """Frozen settings. `parse` is the one door for data from outside: it turns every fault into a
    PlanError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "plan") -> Self:
        """Validate plain data; raises PlanError naming each faulty key, its value, and what was expected."""
        if not isinstance(data, Mapping):
            raise PlanError(f"{where}: expected keys and values, not {type(data).__name__} {shown(data)}.")
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise PlanError(explain(error, cls, where)) from None
