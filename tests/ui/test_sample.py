from __future__ import annotations

from pathlib import Path

import pytest

from manyhands.ui.main import run


@pytest.mark.usefixtures("trained")
def test_the_same_seed_gives_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sample", "tiny", "--prompt", "many ", "--tokens", "30", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert run([*command, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("many ")
    assert len("many \n") < len(texts[0]) <= len("many \n") + 30  # the model may end the text


def test_a_run_a_training_and_a_checkpoint_mean_the_newest(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = set()
    for where in ("tiny", str(trained), str(trained / "checkpoints" / "step-00000008")):
        assert run(["sample", where, "--prompt", "many", "--tokens", "9", "--temperature", "0"]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


@pytest.mark.usefixtures("trained")
def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sample", "tinny"]) == 9
    assert "Did you mean 'tiny'?" in capsys.readouterr().err
    assert run(["sample", str(tmp_path)]) == 9
    assert "round-<number>" in capsys.readouterr().err
    (tmp_path / "table.json").write_text('{"task": "tabular"}', encoding="utf-8")
    assert run(["sample", str(tmp_path)]) == 4
    assert "give a checkpoint that a language model run wrote" in capsys.readouterr().err


def test_a_round_of_a_run_is_newest_by_its_number(trained: Path, tmp_path: Path) -> None:
    from manyhands.ui.checkpoints import locate, origin_of

    for name in ("round-00000002", "round-00000010", "round-99999999.partial", ".round-99999999.partial-1"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    found = locate(str(tmp_path))
    assert found.name == "round-00000010"
    assert origin_of(found) is None
    origin = origin_of(locate("tiny"))
    assert origin is not None
    assert origin.materials == trained / "materials"


def test_a_terminal_is_not_steered() -> None:
    from manyhands.ui.commands.sample import _harmless

    assert _harmless("a\x1b[2Jb\n\tc") == "a\\x1b[2Jb\n        c"
