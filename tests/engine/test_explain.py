from __future__ import annotations

from pathlib import Path

from manyhands.engine.explain import describe, reference_markdown
from manyhands.engine.settings import EngineSettings, Execution, Start

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "engine.md"


def test_every_setting_has_a_meaning_and_says_whether_it_was_changed() -> None:
    settings = {s.path: s for s in describe(EngineSettings(exec=Execution(precision="bf16")))}
    assert all(setting.doc for setting in settings.values())
    assert [path for path, setting in settings.items() if setting.changed] == ["exec.precision"]
    assert settings["exec.precision"].default == "fp32"


def test_the_committed_page_is_up_to_date() -> None:
    command = "python -c 'from manyhands.engine.explain import *; print(reference_markdown(), end=\"\")' > "
    assert PAGE.read_text(encoding="utf-8") == reference_markdown(), f"write it anew: {command}{PAGE}"


def test_the_page_names_every_setting() -> None:
    page = reference_markdown()
    for path in (*(s.path for s in describe(EngineSettings())), *Start.model_fields):
        assert f"| `{path}` |" in page
