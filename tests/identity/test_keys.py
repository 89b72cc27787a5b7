"""Key files and signatures."""

import copy
import os
import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyhands.errors import IdentityError
from manyhands.identity.keys import Identity, create, ephemeral, is_public_key, load, verify

# RFC 8032, 7.1, test 2
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_the_published_vector() -> None:
    identity = Identity(SEED)
    assert identity.public == PUBLIC
    assert identity.sign(b"\x72") == SIGNATURE
    assert verify(PUBLIC, SIGNATURE, b"\x72")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=64), st.integers(0, 511))
def test_a_signature_holds_for_its_key_and_bytes_alone(seed: bytes, data: bytes, bit: int) -> None:
    identity = Identity(seed)
    signature = identity.sign(data)
    assert verify(identity.public, signature, data)
    assert not verify(identity.public, signature, data + b"\0")
    flipped = f"{int(signature, 16) ^ (1 << bit):0128x}"
    assert not verify(identity.public, flipped, data)
    assert not verify(ephemeral().public, signature, data)


@pytest.mark.parametrize(
    "public", ["", PUBLIC.upper(), PUBLIC + "00", PUBLIC[:-1], "z" * 64, "ff" * 32, PUBLIC + "\n"]
)
def test_malformed_keys_verify_nothing(public: str) -> None:
    assert not verify(public, SIGNATURE, b"\x72")
    assert is_public_key(public) == (public == "ff" * 32)


@pytest.mark.parametrize(
    "signature", ["", SIGNATURE.upper(), SIGNATURE[2:], SIGNATURE + "00", "q" * 128, " " * 128]
)
def test_malformed_signatures_are_false(signature: str) -> None:
    assert not verify(PUBLIC, signature, b"\x72")


def test_ephemeral_keys_differ() -> None:
    assert len({ephemeral() for _ in range(5)}) == 5
    assert Identity(SEED) == Identity(SEED)
    assert Identity(SEED) != ephemeral()
    assert Identity(SEED) != PUBLIC


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_seeds_have_32_bytes(size: int) -> None:
    with pytest.raises(IdentityError, match=f"not {size}"):
        Identity(bytes(size))


def test_the_secret_is_not_shown_or_pickled() -> None:
    identity = Identity(SEED)
    for text in (repr(identity), str(identity), f"{identity}"):
        assert PUBLIC in text
        assert SEED.hex() not in text
        assert SEED[:8].hex() not in text
    with pytest.raises(TypeError, match="pass the key file"):
        pickle.dumps(identity)
    with pytest.raises(TypeError, match="pass the key file"):
        copy.deepcopy(identity)
    assert not hasattr(identity, "__dict__")


def test_create_and_load(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "member.key"
    made = create(path)
    assert load(path) == made
    assert load(str(path)).public == made.public
    assert path.stat().st_size == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create(tmp_path / "key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "member.key"
    made = create(path)
    with pytest.raises(IdentityError, match=r"never overwritten.*show-identity"):
        create(path)
    assert load(path) == made
    dangling = tmp_path / "link.key"
    dangling.symlink_to(tmp_path / "nowhere.key")
    with pytest.raises(IdentityError, match="never overwritten"):
        create(dangling)
    assert not (tmp_path / "nowhere.key").exists()


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(IdentityError, match="cannot make the directory"):
        create(tmp_path / "file" / "member.key")


def test_half_a_key_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IdentityError, match="No space left"):
        create(tmp_path / "member.key")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 31, 33, 64, 65, 10_000])
def test_files_of_another_size_are_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "bad.key"
    path.write_bytes(b"a" * size)
    path.chmod(0o600)
    with pytest.raises(IdentityError, match=f"has {size} bytes, expected exactly 32") as caught:
        load(path)
    assert ("raw bytes" in str(caught.value)) == (size in (64, 65))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602, 0o777])
def test_files_open_to_others_are_refused_with_the_chmod(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "my key"
    create(path)
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"mode {mode:04o}.*`chmod 600 '.*my key'`"):
        load(path)
    path.chmod(0o400)
    load(path)


def test_a_missing_file_names_the_command(tmp_path: Path) -> None:
    path = tmp_path / "none.key"
    with pytest.raises(IdentityError) as caught:
        load(path)
    assert f"`manyhands client new-identity --identity-secret-key-path {path}`" in str(caught.value)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError):
        load(tmp_path)
    os.mkfifo(tmp_path / "pipe", 0o600)
    with pytest.raises(IdentityError, match="not a plain file"):
        load(tmp_path / "pipe")
