"""The engine's settings in words: docs/reference/engine.md is `reference_markdown`, and a test keeps the two equal.

The texts are the docstrings of the settings (engine/settings.py), written once; how they are laid out is as with a
plan's (plan/explain.py). No torch here.
"""

from __future__ import annotations

from typing import Final

from manyhands.engine.settings import EngineSettings, Start
from manyhands.plan.explain import Setting, section_tables, settings_of


def describe(settings: EngineSettings) -> list[Setting]:
    """Every setting with its value, default and meaning."""
    return settings_of(settings, EngineSettings())


def reference_markdown() -> str:
    """The page: every setting by section, and what says which processes to start."""
    sections = (
        (name, field.annotation)
        for name, field in EngineSettings.model_fields.items()
        if isinstance(field.annotation, type)
    )
    parts = [_PAGE_HEAD]
    for name, model in sections:
        parts += section_tables(f"{name}.", model, f"`{name}`")
    parts += section_tables("", Start, "Starting")
    return "\n\n".join(parts) + "\n"


_PAGE_HEAD: Final = """\
# The engine's settings

With what `manyhands train` carries out a plan: processes, precision, reports, checkpoints. They are given beside the
plan's own, on the command line as `KEY=VALUE` or in the same file of YAML, and are not part of its hash.
`manyhands config show --format table` prints all of them with their values.

This page is made from the settings (`manyhands.engine.explain.reference_markdown`)."""
