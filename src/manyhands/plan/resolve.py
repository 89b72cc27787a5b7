"""From plain data to a Plan: preset below, the plan's own values above, then every check.

A plan file is YAML in its plainest form: no tags, no duplicate keys, no interpolations. What comes out is
always the same kind of object, and `plan_hash` is its name: two plans with one hash are the same in every
field.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from manyhands.config import shown
from manyhands.errors import PlanError, ProtocolError
from manyhands.identity.canonical import digest
from manyhands.plan.choices import overlay
from manyhands.plan.compatibility import check
from manyhands.plan.presets import values_of
from manyhands.plan.safety import check_runnable, refuse_code
from manyhands.plan.schema import Plan

__all__ = [
    "PLAN_FILE",
    "agreed",
    "check_runnable",
    "dump_plan",
    "new_run_id",
    "plan_hash",
    "read_plan_file",
    "resolve",
    "with_preset",
]

PLAN_FILE: Final = "plan.yaml"
"""In the directory of a training, or of a run that is served from here: its plan, every field written out."""
MAX_FILE_BYTES: Final = 1 << 20
_HASH_DOMAIN: Final = "manyhands plan v1"


def resolve(data: Mapping[str, Any], *, where: str = "plan") -> Plan:
    """A checked plan from plain data; `where` is what messages call its origin.

    The values of data["preset"] lie under the rest. Raises PlanError for unknown or ill-typed keys, an
    unknown preset, choices that do not go together, and anything that names code or is no plain data.
    """
    if not isinstance(data, Mapping):
        raise PlanError(f"{where}: expected keys and values, not {type(data).__name__} {shown(data)}.")
    refuse_code(data, where)
    values = with_preset(data)
    task = values.get("task")
    if isinstance(task, Mapping) and "name" not in task:
        values["task"] = {"name": "language_model", **task}
    plan = Plan.parse(values, where=where)
    check(plan, where=where)
    try:
        plan_hash(plan)
    except ProtocolError as error:  # such as text that is no Unicode, deep inside task.settings
        raise PlanError(f"{where}: {error}") from None
    return plan


def with_preset(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data on top of the values of the preset that it names. Raises PlanError for an unknown preset."""
    preset = data.get("preset")
    return overlay(values_of(preset), data) if isinstance(preset, str) and preset else dict(data)


def read_plan_file(path: Path | str) -> dict[str, Any]:
    """The plain data of a YAML file, before presets and checks. Raises PlanError."""
    path = Path(path).expanduser()
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise PlanError(
            f"there is no plan file {path}. The shortest plan is one line: `preset: diloco`."
        ) from None
    except OSError as error:
        raise PlanError(f"cannot read the plan file {path}: {error.strerror or error}") from None
    if len(data) > MAX_FILE_BYTES:
        raise PlanError(f"{path} has more than {MAX_FILE_BYTES} bytes: that is no plan.")
    try:
        content = yaml.load(data, _PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PlanError(f"{path}: {_yaml_fault(error)}") from None
    if content is None:
        raise PlanError(
            f"{path} says nothing. The shortest plan is one line: `preset: diloco`; `{{}}` means the defaults."
        )
    if not isinstance(content, dict):
        raise PlanError(f"{path}: expected keys and values, not {type(content).__name__} {shown(content)}.")
    refuse_code(content, str(path))
    return content


def dump_plan(plan: Plan) -> str:
    """The plan as YAML text, every field written out; `load_plan` of it gives an equal plan."""
    return yaml.dump(plan.model_dump(mode="json"), Dumper=_PlainDumper, sort_keys=False, allow_unicode=True)


def plan_hash(plan: Plan) -> str:
    """SHA-256 over the canonical bytes of all fields, but for where shards lie: 64 hex digits.

    They may be moved, and lie elsewhere on each machine; that they are the same is known by their manifest.
    """
    return digest(agreed(plan), _HASH_DOMAIN)


def agreed(plan: Plan) -> Plan:
    """What is the same on every machine: the plan, but for where shards lie."""
    if plan.data.shards is None:
        return plan
    return plan.model_copy(update={"data": plan.data.model_copy(update={"shards": "given"})})


def new_run_id(plan: Plan) -> str:
    """The plan's fixed run id, else its name and six random hex digits: at most 64 characters."""
    return plan.run_id or f"{plan.name[:57]}-{secrets.token_hex(3)}"


class _PlainLoader(yaml.SafeLoader):
    """YAML without tags, duplicate keys, merge keys and dates, and with 1e-3 as the number that it looks
    like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {shown(key)} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys (<<) are not expanded: construct_mapping sees every key that is written."""

    def refuse_tag(self, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(
            None, None, f"the tag {node.tag} names code to run; a plan is plain data", node.start_mark
        )


class _PlainDumper(yaml.SafeDumper):
    """Writes what _PlainLoader reads."""


_PlainLoader.add_constructor(None, _PlainLoader.refuse_tag)
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    _PlainLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _PlainLoader.refuse_tag)
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 wants a dot before it believes an exponent; text that looks like this is quoted when written
for _class in (_PlainLoader, _PlainDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def _yaml_fault(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        return at + ", ".join(part for part in (error.context, error.problem) if part) + "."
    if isinstance(error, RecursionError):
        return "nested too deeply: that is no plan."
    return f"not readable as YAML: {str(error).splitlines()[0]}."
