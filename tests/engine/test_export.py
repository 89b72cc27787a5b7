"""What onnxruntime computes is what torch computes, at shapes that the tracer has not seen."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from manyhands.engine import export as export_module
from manyhands.engine.export import export_onnx, export_safetensors
from manyhands.errors import DataError, MissingExtra
from manyhands.plan.resolve import resolve
from manyhands.tasks.protocol import Saved
from manyhands.tasks.registry import family_of
from manyhands.tasks.saved import load_saved

GPT2 = {"name": "language_model", "model": {"n_layer": 1, "n_head": 2, "n_embd": 16}, "block_size": 16}
LLAMA_MODEL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GENERATED = {"puzzles": 4, "evaluation_puzzles": 2}
TASKS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": {**GPT2, "model_type": "llama", "model": LLAMA_MODEL},
    "grids": {
        "name": "grids",
        "size": 6,
        "generated": GENERATED,
        "model": {"width": 16, "heads": 2, "encoder_layers": 1, "decoder_layers": 1},
    },
    "tabular": {"name": "tabular"},
    "survival": {"name": "survival"},
}


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory that the task of this name saves of its first weights, moved a little."""

    def save(name: str) -> Path:
        root = tmp_path_factory.mktemp(name)
        (root / "text.txt").write_text("many hands make light work " * 60, encoding="utf-8")
        task: dict[str, Any] = dict(TASKS[name])
        if task["name"] == "language_model":
            task |= {"text": {"path": str(root / "text.txt")}, "tokenizer": {"kind": "character"}}
        plan = resolve({"task": task})
        family = family_of(plan)
        prepared = family.prepare(plan, root / "materials")
        torch.manual_seed(0)
        weights = load_file(prepared.first_weights)
        moved = {k: w + 0.05 * torch.randn_like(w) for k, w in weights.items()}
        family.open(plan, root / "materials").save_pretrained(moved, root / "kept")
        return root / "kept"

    return save


def _runtime() -> Any:
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    return pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.mark.parametrize("name", TASKS)
def test_a_graph_computes_what_the_model_does(
    saved_by: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    runtime = _runtime()
    saved = load_saved(saved_by(name))
    exported = export_onnx(saved, tmp_path / "model.onnx")
    assert exported.difference is not None
    assert exported.difference < 1e-4
    assert exported.size_bytes == (tmp_path / "model.onnx").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    more = {key: torch.cat([value] * 3) for key, value in saved.inputs.items()}
    (got,) = session.run(None, {key: value.numpy() for key, value in more.items()})
    with torch.no_grad():
        np.testing.assert_allclose(got, saved.call(**more).numpy(), atol=1e-4)


def test_half_precision_is_compared_with_full(saved_by: Callable[[str], Path], tmp_path: Path) -> None:
    runtime = _runtime()
    exported = export_onnx(load_saved(saved_by("gpt2")), tmp_path / "half.onnx", half=True)
    assert exported.difference is not None
    assert 1e-5 < exported.difference < 0.05
    (output,) = runtime.InferenceSession(
        tmp_path / "half.onnx", providers=["CPUExecutionProvider"]
    ).get_outputs()
    assert output.type == "tensor(float16)"


def test_weights_of_a_large_model_lie_beside_the_graph(
    saved_by: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = _runtime()
    program = import_module("torch.onnx._internal.exporter._onnx_program")
    if not hasattr(program, "_LARGE_MODEL_THRESHOLD"):
        pytest.skip("this torch has no threshold that a test could lower")
    monkeypatch.setattr(program, "_LARGE_MODEL_THRESHOLD", 10)
    saved = load_saved(saved_by("tabular"))
    exported = export_onnx(saved, tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert exported.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {key: value.numpy() for key, value in saved.inputs.items()})
    with torch.no_grad():
        np.testing.assert_allclose(got, saved.call(**saved.inputs).numpy(), atol=1e-4)


class Doubled(torch.nn.Module):
    """Computes something else when it is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = 2 if torch.compiler.is_exporting() else 1
        return self.layer(x) * factor


class FixedRows(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.arange(4)[:, None]


def _saved(model: torch.nn.Module) -> Saved:
    return Saved(
        model=model.eval(),
        call=model,
        inputs={"x": torch.ones(4, 3)},
        axes={"x": {0: "batch"}},
        outputs=("y",),
    )


def test_a_graph_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    _runtime()
    with pytest.raises(DataError, match=r"differs from torch by .*: nothing was written"):
        export_onnx(_saved(Doubled()), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_axis_that_is_not_free_is_refused(tmp_path: Path) -> None:
    _runtime()
    with pytest.raises(DataError, match=r"does not run at \{'x': \(5, 3\)\}.*name only axes"):
        export_onnx(_saved(FixedRows()), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, **names: str) -> None:
        raise MissingExtra(f"{names['option']} needs {name}: {names['extra']}")

    monkeypatch.setattr(export_module, "optional", missing)
    with pytest.raises(MissingExtra, match="--to onnx needs onnx: onnx"):
        export_onnx(_saved(Doubled()), tmp_path / "model.onnx")


def test_safetensors_are_the_weights_alone(saved_by: Callable[[str], Path], tmp_path: Path) -> None:
    saved = load_saved(saved_by("gpt2"))
    export_safetensors(saved, tmp_path / "whole.safetensors")
    export_safetensors(saved, tmp_path / "half.safetensors", half=True)
    whole, half = load_file(tmp_path / "whole.safetensors"), load_file(tmp_path / "half.safetensors")
    assert whole.keys() == half.keys() == dict(saved.model.named_parameters()).keys()
    for name, parameter in saved.model.named_parameters():
        assert torch.equal(whole[name], parameter)
        assert torch.equal(half[name], parameter.half())
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_directory_that_says_nothing(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="does not say which task wrote it"):
        load_saved(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"config\.json"):
        load_saved(tmp_path)
