from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from manyhands.errors import DataError
from manyhands.storage.lock import take_lock
from manyhands.ui.failed_starts import removed_if_nothing_came_of_it
from manyhands.ui.main import run

CONFIGURATION = {"plan.yaml": "", "engine.yaml": "", "lock": "1", "events.jsonl": '{"kind": "preparing"}\n'}


def fail_in(directory: Path, make: Callable[[], object] = lambda: None) -> None:
    def start() -> None:
        with removed_if_nothing_came_of_it(directory):
            make()
            raise DataError("the start failed")

    with pytest.raises(DataError):
        start()


def filled(directory: Path, files: dict[str, str]) -> None:
    (directory / "materials").mkdir(parents=True)
    for name, text in (CONFIGURATION | files).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")


def test_only_what_holds_nothing_is_removed(tmp_path: Path) -> None:
    fail_in(tmp_path / "empty", partial(filled, tmp_path / "empty", {}))
    assert not (tmp_path / "empty").exists()
    for number, (name, text) in enumerate({
        "events.jsonl": '{"kind": "preparing"}\n{"kind": "started"}\n',
        "materials/tokens.bin": "",
        "checkpoints/step-00000001": "",
        "notes.txt": "",
    }.items()):  # fmt: skip
        fail_in(tmp_path / str(number), partial(filled, tmp_path / str(number), {name: text}))
        assert (tmp_path / str(number) / name).is_file()
    fail_in(tmp_path / "broken", partial(filled, tmp_path / "broken", {"events.jsonl": "no json\n"}))
    assert (tmp_path / "broken").is_dir()


def test_what_was_there_or_went_well_or_is_anothers_stays(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    fail_in(tmp_path / "before")
    assert (tmp_path / "before").is_dir()
    with removed_if_nothing_came_of_it(tmp_path / "well"):
        (tmp_path / "well").mkdir()
    assert (tmp_path / "well").is_dir()
    with ExitStack() as stack:
        fail_in(
            tmp_path / "anothers", lambda: stack.enter_context(take_lock(tmp_path / "anothers", "It trains."))
        )
    assert (tmp_path / "anothers").is_dir()
    fail_in(tmp_path / "never-made")


def test_a_training_without_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANYHANDS_HOME", str(tmp_path / "home"))
    wrong = ["train", "task.text.path=inptu.txt", "--logs", "none"]
    (tmp_path / "mine").mkdir()
    for where in ([], ["run=named"], ["--directory", str(tmp_path / "new")], ["resume=latest"]):
        assert run([*wrong, *where]) == 4
        assert "inptu.txt does not exist" in capsys.readouterr().err
    assert list((tmp_path / "home" / "runs").iterdir()) == []
    assert not (tmp_path / "new").exists()
    assert run([*wrong, "--directory", str(tmp_path / "mine")]) == 4
    assert (tmp_path / "mine" / "plan.yaml").is_file()


@pytest.mark.slow
def test_one_of_several_processes(
    manyhands: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert manyhands("train", "task.text.path=inptu.txt", "processes=2", "exec.restarts=0").returncode == 4
    assert list((tmp_path / "home" / "runs").iterdir()) == []
