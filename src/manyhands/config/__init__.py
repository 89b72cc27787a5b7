"""Typed settings and the places where manyhands keeps its files.

`Settings` is the base of every configuration object of the house: frozen, keyword-only, and unknown keys
are refused with the nearest match. Imported by programs that must start fast: nothing heavy here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from platformdirs import user_data_path
from pydantic import BaseModel, ConfigDict, ValidationError

from manyhands.errors import PlanError

HOME_VARIABLE = "MANYHANDS_HOME"


def home() -> Path:
    """MANYHANDS_HOME, else the platform's data directory. Not created here."""
    chosen = os.environ.get(HOME_VARIABLE)
    return Path(chosen).expanduser() if chosen else user_data_path("manyhands")


class Settings(BaseModel):
    """Frozen settings. `parse` is the one door for data from outside: it turns every fault into a PlanError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, where: str = "plan") -> Self:
        """Validate plain data; raises PlanError naming each faulty key, its value, and what was expected."""
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise PlanError(explain(error, cls, where)) from None


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """A validation error in words: one line per fault, with a suggestion for unknown keys."""
    lines = []
    for fault in error.errors(include_url=False):
        path = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            known = sorted(_fields_at(model, fault["loc"][:-1]))
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1, cutoff=0.5)
            hint = f" Did you mean '{near[0]}'?" if near else f" Known keys: {', '.join(known)}." if known else ""
            lines.append(f"unknown key '{path}'.{hint}")
        elif fault["type"] == "missing":
            lines.append(f"'{path}' is missing.")
        else:
            message = fault["msg"].removeprefix("Value error, ")
            lines.append(f"'{path}' is {fault['input']!r}: {message}.".replace("..", "."))
    return f"{where}: " + "\n".join(lines) if len(lines) == 1 else f"{where}:\n  " + "\n  ".join(lines)


def _fields_at(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The field names of the settings found by walking `path` from `model`; empty when the walk ends nowhere.

    A union's tag (as in task.language_model.model) picks the member whose tag it is.
    """
    members: list[type[BaseModel]] = [model]
    for part in path:
        tagged = [m for m in members if _tag(m) == part]
        if tagged:
            members = tagged
            continue
        found: list[type[BaseModel]] = []
        for member in members:
            field = member.model_fields.get(str(part))
            if field is not None:
                found += _models_in(field.annotation)
        members = found
    return {name for member in members for name in member.model_fields}


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("name") or model.model_fields.get("kind")
    values = getattr(field.annotation, "__args__", ()) if field is not None else ()
    return values[0] if values else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in getattr(annotation, "__args__", ()) for found in _models_in(part)]
