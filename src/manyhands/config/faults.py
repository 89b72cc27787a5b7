"""What is wrong with settings, in words: path, value, what was expected, and the nearest thing that exists.

pydantic's places name the chosen member of a union (task.language_model.block_size); nobody writes that, so
paths here are those of the plan (task.block_size).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError

MISSING: Final = "when_missing"
"""In the `json_schema_extra` of a field that has no default: the sentence on what to give."""
_LONGEST_VALUE: Final = 80
_LISTED: Final = 12
"""So many names are listed at most."""
_REPHRASED: Final = (
    (re.compile(r"^Value error, "), ""),
    (re.compile(r"^Input should be a valid integer.*"), "expected a whole number"),
    (re.compile(r"^Input should be a valid number.*"), "expected a number"),
    (re.compile(r"^Input should be a valid boolean.*"), "expected true or false"),
    (re.compile(r"^Input should be a valid string.*"), "expected text"),
    (re.compile(r"^Input should be a valid dictionary.*"), "expected keys and values"),
    (re.compile(r"^Input should be a valid (?:tuple|list).*"), "expected a list, as in [a, b]"),
    (re.compile(r"^String should have at least 1 character"), "expected some text"),
    (
        re.compile(r"^String should match pattern '\^\[a-z0-9-\]\{1,(\d+)\}\$'"),
        r"expected lower-case letters, digits and dashes, at most \1",
    ),
    (re.compile(r"^Input should be greater than or equal to (\S+)"), r"expected \1 or more"),
    (re.compile(r"^Input should be less than or equal to (\S+)"), r"expected \1 or less"),
    (re.compile(r"^Input should be greater than (\S+)"), r"expected more than \1"),
    (re.compile(r"^Input should be less than (\S+)"), r"expected less than \1"),
    (re.compile(r"^Input should be "), "expected "),
    (re.compile(r"^Input should have "), "expected "),
    (re.compile(r"^String should "), "expected text to "),
)


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """A validation error in words: one line per fault, with a suggestion for what is not known."""
    faults = error.errors(include_url=False)
    places = [fault["loc"] for fault in faults]
    lines = [
        _line(dict(fault), model)
        for fault in faults
        # a list of which every item is at fault is also said to be too short
        if fault["type"] != "too_short"
        or not any(p[: len(fault["loc"])] == fault["loc"] != p for p in places)
    ]
    return f"{where}: {lines[0]}" if len(lines) == 1 else f"{where}:\n  " + "\n  ".join(lines)


def did_you_mean(word: str, known: Iterable[str], *, within: str = "") -> str:
    """` Did you mean 'x'?` for the nearest of `known`, and what there is where that is a short list; or nothing.

    within: the path before the words, which `word` has not.
    """
    known = sorted(known)
    begins = [name for name in known if len(word) > 1 and name.startswith(word)]
    near = begins or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    said = f" Did you mean '{within}{near[0]}'?" if near else ""
    if near and len(known) > _LISTED:
        return said
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"{said} Known: {', '.join(known[:_LISTED])}{more}." if known else ""


def differences(now: Any, then: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two pieces of plain data differ: the path, and what stands there in the one and in the other."""
    if isinstance(now, Mapping) and isinstance(then, Mapping):
        for key in [*now, *(key for key in then if key not in now)]:
            yield from differences(now.get(key), then.get(key), f"{path}.{key}".lstrip("."))
    elif now != then:
        yield path, now, then


def shown(value: Any) -> str:
    """The value as messages show it: its repr, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _line(fault: dict[str, Any], model: type[BaseModel]) -> str:
    path, members = _walk(model, fault["loc"])
    value, context = fault["input"], fault.get("ctx", {})
    at = ".".join(path)
    match fault["type"]:
        case "extra_forbidden":
            known = {name for member in members for name in member.model_fields}
            within = "".join(f"{part}." for part in path[:-1])
            return f"unknown key '{at}'.{did_you_mean(path[-1], known, within=within)}"
        case "missing":
            return f"'{at}' is missing{_what_to_give(members, path[-1])}"
        case "literal_error":
            return f"'{at}' is {shown(value)}: {_choices(value, context['expected'])}"
        case "union_tag_invalid":
            tag = context["tag"]
            at = ".".join((*path, context["discriminator"].strip("'")))
            return f"'{at}' is {shown(tag)}: {_choices(tag, context['expected_tags'])}"
        case "union_tag_not_found":
            return f"'{'.'.join((*path, context['discriminator'].strip(chr(39))))}' is missing."
    message = fault["msg"]
    for pattern, words in _REPHRASED:
        message = pattern.sub(words, message)
    return f"'{at}' is {shown(value)}: {message.rstrip('.')}." if at else f"{message.rstrip('.')}."


def _what_to_give(members: Iterable[type[BaseModel]], name: str) -> str:
    fields = [member.model_fields[name] for member in members if name in member.model_fields]
    extras = [field.json_schema_extra for field in fields if isinstance(field.json_schema_extra, dict)]
    return next((f": {extra[MISSING]}" for extra in extras if MISSING in extra), ".")


def _choices(value: Any, expected: str) -> str:
    """pydantic lists the choices as `'a', 'b' or 'c'`."""
    known = re.findall(r"'([^']*)'", expected)
    words = (
        " or ".join((", ".join(f"'{k}'" for k in known[:-1]), f"'{known[-1]}'")) if known[1:] else expected
    )
    near = (
        difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        if isinstance(value, str) and known[1:]
        else []
    )
    return f"expected {words}." + (f" Did you mean '{near[0]}'?" if near else "")


def _walk(model: type[BaseModel], place: Sequence[int | str]) -> tuple[list[str], list[type[BaseModel]]]:
    """The path of `place` as one would write it, and the settings in which its last part was looked up.

    Where a field is a union of settings, pydantic inserts the tag of the member it chose: that part is not
    shown.
    """
    path: list[str] = []
    members, looked_up = [model], [model]
    for part in place:
        if len(members) > 1:
            chosen = [member for member in members if part in _tags(member)]
            if chosen:
                members = chosen
                continue
        looked_up = members
        path.append(str(part))
        found = [member.model_fields[str(part)] for member in members if str(part) in member.model_fields]
        members = [inner for field in found for inner in _models_in(field.annotation)]
    return path, looked_up


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    field = model.model_fields.get("name") or model.model_fields.get("kind")
    return get_args(field.annotation) if field is not None else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]
