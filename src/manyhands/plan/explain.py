"""A plan in words: every setting with its value, its default and its documentation.

The texts are the docstrings of the schema's fields, written once. `manyhands server validate` prints
`render`; docs/reference/plan.md is `reference_markdown`, and a test keeps the two equal.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manyhands.plan.compatibility import RULES
from manyhands.plan.presets import PRESETS
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan

_PLAIN_NAMES: Final = {int: "integer", float: "number", str: "text", bool: "true or false"}
_BOUNDS: Final = ((Ge, "ge", "at least"), (Gt, "gt", "above"), (Le, "le", "at most"), (Lt, "lt", "below"))
_VALUE_WIDTH: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One setting of a plan. `path` is what an override names, as in local.optimizer.lr."""

    path: str
    value: Any
    default: Any
    doc: str

    @property
    def changed(self) -> bool:
        return bool(self.value != self.default)


def describe(plan: Plan) -> list[Setting]:
    """Every setting of the plan, nested ones too, in the order of the schema. A section is not a setting."""
    return settings_of(plan, Plan())


def settings_of(section: BaseModel, default: BaseModel) -> list[Setting]:
    """As `describe`, of any settings beside their defaults."""
    return list(_settings(section, default, ""))


def render(plan: Plan, *, width: int = 110) -> str:
    """The plan as aligned text of at most `width` columns, `*` before what differs from the default; its hash
    last."""
    settings = describe(plan)
    head = f"Plan '{plan.name}': {sum(s.changed for s in settings)} of {len(settings)} settings differ (*)"
    return "\n".join([head, "", *lines_of(settings, width), "", f"plan hash {plan_hash(plan)}"])


def lines_of(settings: Sequence[Setting], width: int = 110) -> list[str]:
    """Path, value and meaning in aligned columns, `*` before what differs from its default."""
    path_width = max(len(s.path) for s in settings)
    indent = " " * (path_width + _VALUE_WIDTH + 6)
    lines: list[str] = []
    for setting in settings:
        doc = setting.doc + (f" Default: {_as_written(setting.default)}." if setting.changed else "")
        wrapped = textwrap.wrap(doc, max(30, width - len(indent)), break_on_hyphens=False)
        mark, value = "*" if setting.changed else " ", _as_written(setting.value)
        head = f"{mark} {setting.path:{path_width}}  {value:{_VALUE_WIDTH}}  "
        if len(value) > _VALUE_WIDTH:  # the text starts on the next line
            lines.append(head.rstrip())
        else:
            lines.append(head + wrapped.pop(0))
        lines += [indent + line for line in wrapped]
    return lines


def _settings(section: BaseModel, default: BaseModel, path: str) -> Iterator[Setting]:
    """`default`: the same section of the default plan. Where that is another task, only its name can be
    compared, and the rest has the defaults of the task at hand."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        comparable = type(default) is type(section) or name == "name"
        usual = getattr(default, name) if comparable else field.get_default(call_default_factory=True)
        if field.is_required() and not comparable:
            usual = value  # no default to differ from
        if isinstance(value, BaseModel):
            yield from _settings(value, usual, f"{path}{name}.")
        else:
            doc = _one_line(field.description)
            yield Setting(path=path + name, value=_plain(value), default=_plain(usual), doc=doc)


def _plain(value: Any) -> Any:
    """A list of sections as plain data."""
    if isinstance(value, tuple):
        return tuple(item.model_dump() if isinstance(item, BaseModel) else item for item in value)
    return value


def _one_line(doc: str | None) -> str:
    return " ".join((doc or "").split())


def _as_written(value: Any) -> str:
    """As one would write it in YAML or on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_as_written, value)) + "]"
    return str(value)


# ------------------------------------------------------------------------------ the page
def reference_markdown() -> str:
    """docs/reference/plan.md: every setting by section, the presets, and the rules of what goes together."""
    parts = [_PAGE_HEAD, *section_tables("", Plan, "The plan itself"), _presets_table(), _rules_list()]
    return "\n\n".join(parts) + "\n"


def section_tables(path: str, model: type[BaseModel], title: str) -> Iterator[str]:
    """A heading and a table in Markdown for these settings, and for each section in them; `path` is before names."""
    rows, below = [], []
    for name, field in model.model_fields.items():
        members = _models_in(field.annotation)
        for member in members:
            tag = _only_choice(member) if len(members) > 1 else None
            heading = f"`{path}{name}`" + (f" with `name: {tag}`" if tag else "")
            below.append((f"{path}{name}.", member, f"{heading}: {_one_line(field.description)}"))
        if not members:
            default = field.get_default(call_default_factory=True)
            cells = (
                f"`{path}{name}`",
                _type_in_words(field),
                f"`{_as_written(default)}`" if not field.is_required() else "required",
                _one_line(field.description),
            )
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = "\n".join(("| setting | kind | default | meaning |", "|---|---|---|---|", *rows))
    yield "\n\n".join(
        part for part in (f"## {title}", _one_line(model.__doc__), table if rows else "") if part
    )
    for prefix, member, heading in below:
        yield from section_tables(prefix, member, heading)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]


def _only_choice(model: type[BaseModel]) -> str | None:
    values = get_args(model.model_fields["name"].annotation) if "name" in model.model_fields else ()
    return str(values[0]) if len(values) == 1 else None


def _type_in_words(field: FieldInfo) -> str:
    bounds = _bounds_in_words(field.metadata)
    return _annotation_in_words(field.annotation) + (f" {bounds}" if bounds else "")


def _annotation_in_words(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        bounds = _bounds_in_words(args[1:])
        return _annotation_in_words(args[0]) + (f" {bounds}" if bounds else "")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join("`null`" if arg is types.NoneType else _annotation_in_words(arg) for arg in args)
    if origin is tuple:
        return f"list of {_annotation_in_words(args[0])}"
    if origin is dict:
        return "mapping"
    return _PLAIN_NAMES[annotation]


def _bounds_in_words(metadata: Any) -> str:
    """pydantic keeps the bounds of an Annotated alias inside a FieldInfo's own metadata."""
    flat = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else (item,))]
    words = [
        f"{text} {getattr(m, attribute)}"
        for m in flat
        for kind, attribute, text in _BOUNDS
        if isinstance(m, kind)
    ]
    words += [f"matching `{m.pattern}`" for m in flat if getattr(m, "pattern", None)]
    return ", ".join(words)


def _presets_table() -> str:
    rows = []
    for name, preset in PRESETS.items():
        values = "<br>".join(f"`{path}={_as_written(value)}`" for path, value in _leaves(preset.values))
        rows.append(f"| `{name}` | {preset.summary} | {values} | {preset.source} |")
    return "\n".join(
        (_PRESETS_HEAD, "", "| preset | what it is | values | source |", "|---|---|---|---|", *rows)
    )


def _leaves(values: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def _rules_list() -> str:
    rules = "\n".join(f"- {_one_line(rule.__doc__)}" for rule in RULES)
    return f"{_RULES_HEAD}\n\n{rules}"


_PAGE_HEAD: Final = """\
# The plan

What a run is: one file of YAML, or `KEY=VALUE` on the command line, or both (the command line wins).
Everything has a default; unknown keys are refused with the nearest match. The clients of a run agree on the
plan by its hash, which covers every setting below. `manyhands server validate --plan FILE` prints a plan with
all of its values.

This page is made from the schema (`manyhands.plan.explain.reference_markdown`)."""

_PRESETS_HEAD: Final = """\
## Presets

`preset: NAME` puts these values under the plan's own: whatever the plan says wins. Where a plan or an
override names another optimizer, codec or task than the preset, that section starts from the schema's
defaults."""

_RULES_HEAD: Final = """\
## What goes together

A plan that breaks one of these rules is refused, with the values and what to do. Beside them, a setting that
its section's choice would ignore is refused when it differs from its default (such as `outer.momentum` with
`adamw`)."""
