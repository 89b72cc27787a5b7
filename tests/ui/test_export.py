from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from manyhands.ui.main import run


@pytest.mark.usefixtures("trained")
def test_weights_alone_beside_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["export", "tiny", "--to", "safetensors"]) == 0
    assert capsys.readouterr().out.startswith("step-00000008.safetensors  ")
    assert "transformer.wte.weight" in load_file(tmp_path / "step-00000008.safetensors")
    assert run(["export", "tiny", "--to", "safetensors"]) == 2
    assert "it exists already" in capsys.readouterr().err


@pytest.mark.usefixtures("trained")
def test_a_graph_says_how_far_it_is_from_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    assert run(["export", "tiny", "--to", "onnx", "--output", str(tmp_path / "new" / "m.onnx")]) == 0
    assert "max abs difference from torch" in capsys.readouterr().out
    assert (tmp_path / "new" / "m.onnx").is_file()
