"""Where the manifest of a host's shards is read: outside of its container, or in it, as the training will be."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import click
import pytest

from manyhands.data.shards.manifest import read_manifest
from manyhands.engine.configuration import Configuration, configure
from manyhands.errors import DataError, StorageError
from manyhands.hosts.hosts_file import Host
from manyhands.ui import train_there
from manyhands.ui.train_there import There

IN_DOCKER = ("task=tabular", "exec.run_in_docker=true")


class _Files:
    """The agent of a host: what it reads outside, or in its container; None: there is no such file."""

    def __init__(self, text: str | None) -> None:
        self._text = text

    async def ask(self, op: str, *, path: str, **_fields: object) -> dict[str, str]:
        assert (op, path) == ("text", "/data/KPkp/manifest.json")
        if self._text is None:
            raise StorageError(f"a: no such file: {path}")
        return {"text": self._text}


def read(
    monkeypatch: pytest.MonkeyPatch, words: Sequence[str], outside: str | None, inside: str | None
) -> list[str]:
    """The manifests with which configurations are composed, in their order; the last one counts."""
    texts: list[str] = []

    @contextlib.asynccontextmanager
    async def reached(_host: Host, *, docker: bool) -> AsyncIterator[_Files]:
        yield _Files(inside if docker else outside)

    def compose(given: Sequence[str], shards: str | None) -> Configuration:
        assert shards is not None
        texts.append((Path(shards) / "manifest.json").read_text())
        if texts[-1] == "broken":
            read_manifest(Path(shards))
        if texts[-1] == "of rooks":
            raise click.UsageError(f"--pieces KPkp contradicts the shards in {shards}")
        return configure(given)

    monkeypatch.setattr(train_there, "reached", reached)
    there = There(
        hosts=("a",), directory=None, devices=None, allowed=(), logs=None,
        shards="/data/KPkp", upload=None, export=True,
    )  # fmt: skip
    host = Host.parse({"HostName": "a", "DockerLaunchCommand": "docker exec -it c"}, where="a test")
    there._composed(compose, [words], host)
    return texts


def test_the_manifest_is_that_of_where_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, ["task=tabular"], "outside", "inside") == ["outside"]
    assert read(monkeypatch, IN_DOCKER, "outside", "inside") == ["outside", "inside"]
    assert read(monkeypatch, IN_DOCKER, None, "inside") == ["inside"]
    with pytest.raises(DataError, match=r"manifest\.json: --shards is the directory as a sees it"):
        read(monkeypatch, IN_DOCKER, "outside", None)
    with pytest.raises(DataError, match="no such file"):
        read(monkeypatch, IN_DOCKER, None, None)


def test_what_is_wrong_with_them_is_said_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"a:/data/KPkp/manifest\.json") as broken:
        read(monkeypatch, ["task=tabular"], "broken", None)
    assert "manyhands-shards-" not in str(broken.value)
    with pytest.raises(click.UsageError, match=r"contradicts the shards in a:/data/KPkp$"):
        read(monkeypatch, ["task=tabular"], "of rooks", None)


def test_one_of_the_two(tmp_path: Path) -> None:
    there = There(
        hosts=("a",), directory=None, devices=None, allowed=(), logs=None,
        shards="/data/KPkp", upload=tmp_path, export=True,
    )  # fmt: skip
    with pytest.raises(click.UsageError, match="give one of the two"):
        there._composed(
            lambda _words, _shards: configure(), [[]], Host.parse({"HostName": "a"}, where="a test")
        )
