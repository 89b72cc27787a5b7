"""Settings: frozen, strict about keys, one door for data from outside; and where files are kept."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from manyhands.config import HOME_VARIABLE, Settings, home
from manyhands.errors import PlanError


class Inner(Settings):
    size: int = 1
    """How large."""


class Outer(Settings):
    inner: Inner = Inner()
    kind: Literal["near", "far"] = "near"
    share: float = 0.5


def test_home_is_the_variable_or_the_platform_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert home() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv(HOME_VARIABLE, "~/elsewhere")
    assert home() == tmp_path / "me" / "elsewhere"
    monkeypatch.delenv(HOME_VARIABLE)
    assert home().name == "manyhands"
    assert not home().exists()


def test_settings_do_not_change_and_know_their_docs() -> None:
    settings = Outer.parse({"inner": {"size": 3}})
    assert settings.inner.size == 3
    with pytest.raises(ValidationError):
        settings.share = 1.0  # type: ignore[misc]
    assert Inner.model_fields["size"].description == "How large."


@pytest.mark.parametrize("data", [[1], "text", None, 3])
def test_only_mappings_are_settings(data: Any) -> None:
    with pytest.raises(PlanError, match="expected keys and values"):
        Outer.parse(data)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_are_finite(number: float) -> None:
    with pytest.raises(PlanError, match=r"'share' is .*finite"):
        Outer.parse({"share": number})


def test_messages_name_their_origin() -> None:
    with pytest.raises(PlanError, match=r"^site\.yaml: unknown key 'shar'\. Did you mean 'share'\?"):
        Outer.parse({"shar": 1}, where="site.yaml")
