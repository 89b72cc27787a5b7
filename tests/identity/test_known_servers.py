"""Pinning: believed at first contact, then held to, unless the user gives a key."""

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from manyhands.config import HOME_VARIABLE
from manyhands.errors import IdentityError, Refused
from manyhands.identity.known_servers import default_path, known, pin

A, B = "aa" * 32, "bb" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys" / "known_servers.json"


def test_first_contact_is_noted_and_then_held_to(file: Path) -> None:
    assert pin("host:8700", A, path=file) is True
    assert pin("host:8700", A, path=file) is False
    assert pin(" HOST:8700", A, path=file) is False
    assert pin("host:8701", B, path=file) is True
    assert pin("[::1]:8700", B, path=file) is True
    assert known(file) == {"host:8700": A, "host:8701": B, "[::1]:8700": B}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir() if not path.name.endswith(".lock")] == [file.name]


def test_another_key_is_refused_with_what_to_do(file: Path) -> None:
    pin("host:8700", A, path=file)
    with pytest.raises(Refused, match=f"--server-key {B}") as caught:
        pin("host:8700", B, path=file)
    assert A in str(caught.value)
    assert str(file) in str(caught.value)
    assert known(file) == {"host:8700": A}


def test_a_given_key_is_checked_and_replaces_the_note(file: Path) -> None:
    with pytest.raises(Refused, match="--server-key says"):
        pin("host:8700", A, given=B, path=file)
    assert known(file) == {}
    assert pin("host:8700", A, given=A.upper(), path=file) is True
    assert pin("host:8700", B, given=B, path=file) is False
    assert known(file) == {"host:8700": B}


@pytest.mark.parametrize(
    "address", ["host", "host:", ":8700", "host:0", "host:70000", "a b:1", "::1:8700", "http://h:1"]
)
def test_addresses_are_host_and_port(file: Path, address: str) -> None:
    with pytest.raises(Refused, match="host:port"):
        pin(address, A, path=file)


@pytest.mark.parametrize("key", ["", "AA" * 32, "aa" * 31])
def test_keys_are_keys(file: Path, key: str) -> None:
    with pytest.raises(Refused, match="64 lower-case hex"):
        pin("host:1", key, path=file)
    assert not file.exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "[" * 100_000,
        '{"version": 2, "servers": {}}',
        '{"version": 1, "servers": {"host:1": "x"}}',
        '{"version": 1, "servers": []}',
        " " * (1 << 20) + "{}",
    ],
    ids=["empty", "cut", "list", "deep", "version", "key", "servers", "large"],
)
def test_a_broken_file_is_not_believed_and_not_lost(file: Path, content: str) -> None:
    file.parent.mkdir()
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(IdentityError, match="not what manyhands writes"):
        pin("host:1", A, path=file)
    assert file.read_text() == content


def test_a_file_that_others_can_write_is_refused(file: Path) -> None:
    pin("host:1", A, path=file)
    file.chmod(0o620)
    with pytest.raises(IdentityError, match="chmod 600"):
        pin("host:1", A, path=file)


def test_a_failed_write_keeps_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pin("host:1", A, path=file)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="No space left"):
        pin("host:2", B, path=file)
    assert json.loads(file.read_text())["servers"] == {"host:1": A}
    assert len(list(file.parent.iterdir())) == 2  # the file and its lock


def test_clients_that_start_together_lose_nothing(file: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda port: pin(f"host:{port}", A, path=file), range(1, 41)))
    assert len(known(file)) == 40


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path))
    assert default_path() == tmp_path / "keys" / "known_servers.json"
    pin("host:1", A)
    assert known() == {"host:1": A}


def test_an_unusable_directory(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    with pytest.raises(IdentityError):
        pin("host:1", A, path=tmp_path / "keys" / "known_servers.json")
