"""Which training a command line means."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from manyhands.ui.plans import configuration_from, quoted, training_directory, unquoted


@pytest.mark.parametrize("text", ["plain", "it's", r"a\b", r"\'", "end\\", "'", "", "'quoted'", "two words"])
def test_what_is_quoted_comes_back(text: str) -> None:
    assert unquoted(quoted(text)) == text
    assert configuration_from(None, [f"task.text.path={quoted(text)}"]).plan.task.text.path == text  # type: ignore[union-attr]


def test_a_training_to_go_on_with_is_named_or_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    (run / "events.jsonl").touch()
    configuration_from(None, ["seed=77"]).keep(run)
    odd = tmp_path / r"it's a\b"
    odd.symlink_to(run)
    for word in ("one", str(run), "runs/one", str(odd)):
        found = configuration_from(None, [f"resume={quoted(word)}"])
        assert found.plan.seed == 77
        assert training_directory(found, None).resolve() == run
    with pytest.raises(
        click.UsageError, match=r"there is no directory 'onne', and no run .* Did you mean 'one'\?"
    ):
        training_directory(configuration_from(None, ["resume=onne"]), None)
