"""The task over endings of three men, which need no tables: samples, materials, a training from end to end."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file

from manyhands.engine.evaluate_checkpoint import evaluate_checkpoint
from manyhands.engine.export import export_onnx
from manyhands.engine.run import train
from manyhands.errors import DataError, Interrupted, PlanError
from manyhands.plan.resolve import resolve
from manyhands.plan.schema import Plan
from manyhands.tasks.chess_endgames import task as task_module
from manyhands.tasks.chess_endgames.saved import load_saved
from manyhands.tasks.chess_endgames.task import FAMILY, ChessEndgames, is_held_out, load_pretrained
from manyhands.tasks.chess_endgames.truth import open_source
from manyhands.tasks.protocol import TRAINING, VALIDATION

SMALL = {"width": 16, "layers": 1, "heads": 2, "tokens": "pieces"}


@pytest.fixture(autouse=True, scope="module")
def _solved_once() -> Iterator[None]:
    """One thread; and king and pawn against king, which takes seconds, is solved for all tests together."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_module, "open_source", cache(open_source))
        yield


def plan_of(seed: int = 1, **task: Any) -> Plan:
    data = {"name": "chess_endgames", "positions": 4000, "validation_positions": 300, "model": SMALL, **task}
    return resolve(
        {
            "seed": seed,
            "task": data,
            "local": {"steps": 10, "batch_size": 64, "optimizer": {"name": "muon", "lr": 0.02}},
            "rounds": {"total": 4, "snapshot_every": 1},
            "evaluation": {"max_batches": 3, "every_snapshots": 0},
        }
    )


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("endgames")
    FAMILY.prepare(plan_of(), directory)
    return directory


@pytest.fixture
def task(materials: Path) -> ChessEndgames:
    opened = FAMILY.open(plan_of(), materials)
    assert isinstance(opened, ChessEndgames)
    return opened


def squares_of(task: ChessEndgames, split: str, count: int) -> npt.NDArray[np.uint8]:
    return task.batch(np.arange(count), split)["squares"].numpy()


# ------------------------------------------------------------------------------------------ samples
def test_a_batch_is_a_function_of_its_indices(task: ChessEndgames) -> None:
    whole = task.batch(np.arange(50))
    some = task.batch(np.array([17, 3, 17]))
    assert [name for name, _, _ in task.source.columns] == list(whole)
    for name, column in some.items():
        assert torch.equal(column, whole[name][[17, 3, 17]]), name
    assert not torch.equal(whole["squares"][3], whole["squares"][17])


def test_no_position_is_in_both_sets_nor_mirrored(task: ChessEndgames) -> None:
    trained, held = squares_of(task, TRAINING, 4000), squares_of(task, VALIDATION, 300)
    mirrored = held.reshape(-1, 8, 8)[:, :, ::-1].reshape(-1, 64)
    known = {row.tobytes() for row in trained}
    assert not any(row.tobytes() in known for row in np.concatenate([held, mirrored]))
    assert is_held_out(held, 0.125).all()
    assert is_held_out(mirrored, 0.125).all()


def test_the_share_that_is_held_out() -> None:
    generator = np.random.default_rng(0)
    squares = np.zeros((20_000, 64), dtype=np.uint8)
    for row in squares:
        row[generator.choice(64, 3, replace=False)] = [6, 12, 1]
    assert is_held_out(squares, 0.125).mean() == pytest.approx(0.125, abs=0.01)
    assert is_held_out(squares, 0.5).mean() == pytest.approx(0.5, abs=0.02)


def test_seeds_change_what_is_trained_on_not_what_is_judged(materials: Path, task: ChessEndgames) -> None:
    other = FAMILY.open(plan_of(seed=2), materials)
    assert isinstance(other, ChessEndgames)
    assert not np.array_equal(squares_of(task, TRAINING, 20), squares_of(other, TRAINING, 20))
    assert np.array_equal(squares_of(task, VALIDATION, 20), squares_of(other, VALIDATION, 20))


def test_indices_and_sets_that_are_not_there(task: ChessEndgames) -> None:
    with pytest.raises(DataError, match=r"4000\.\.4000 do not lie within the 4000 positions"):
        task.batch(np.array([4000]))
    with pytest.raises(DataError, match="there is no set 'games'"):
        task.samples("games")


# ------------------------------------------------------------------------------------------ materials
def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"KPvKP\.rtbw"):
        FAMILY.prepare(plan_of(pieces="KPkp", syzygy=str(tmp_path)), tmp_path / "materials")


def test_four_men_without_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"name the directory"):
        FAMILY.prepare(plan_of(pieces="KPkp"), tmp_path)


def test_materials_of_another_plan(materials: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of the pieces KPk"):
        FAMILY.open(plan_of(pieces="KQk"), materials)
    with pytest.raises(DataError, match=r"endgames\.json"):
        FAMILY.open(plan_of(), tmp_path)
    with pytest.raises(PlanError, match="family of chess endgames"):
        FAMILY.open(resolve({"task": {"name": "grids"}}), materials)


def test_without_its_data_the_task_has_models_all_the_same(materials: Path, tmp_path: Path) -> None:
    FAMILY.without_data(plan_of(), materials, tmp_path)
    wider = plan_of(model={**SMALL, "width": 32})
    prepared = FAMILY.prepare_model(wider, tmp_path)
    model = FAMILY.open(wider, tmp_path).build_model()
    weights = load_file(prepared.first_weights)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: w.shape for n, w in weights.items()
    }


# ------------------------------------------------------------------------------------------ a training
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    result = train(plan_of(), directory)
    assert result.validation_loss_after < 0.7 * result.validation_loss_before
    return directory


def test_a_training_goes_on_exactly(trained: Path, tmp_path: Path) -> None:
    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 20:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        train(plan_of(), tmp_path, on_event=stop)
    train(plan_of(), tmp_path, resume=tmp_path)
    whole, cut = (
        load_pretrained(place / "checkpoints" / "step-00000040").state_dict() for place in (trained, tmp_path)
    )
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_an_evaluation_has_figures_tables_and_boards(trained: Path) -> None:
    (evaluated,) = evaluate_checkpoint(
        trained / "checkpoints" / "step-00000040",
        plan_of(),
        trained / "materials",
        device=torch.device("cpu"),
        samples=300,
    )
    result = evaluated.result
    value, policy, worst_value, _ = result.listings
    for listing in (value, policy):
        assert sum(int(row[said]) for row in listing.rows for said in ("loss", "draw", "win")) == 300
    right = sum(int(row[str(row["truth"])]) for row in value.rows)
    assert result.metrics["value_accuracy"] == right / 300
    assert result.metrics["value_accuracy"] > 0.6
    assert result.metrics["policy_accuracy"] > 0.6
    assert all(row["truth"] != row["model"] for row in worst_value.rows)
    assert result.picture is not None
    assert result.seconds > 0


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 1e-2)])
def test_the_exported_graph_answers_real_positions(
    trained: Path, task: ChessEndgames, tmp_path: Path, half: bool, tolerance: float
) -> None:
    """Among them rows whose list of moves is filled up with -1."""
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason="the extra onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    saved = load_saved(trained / "checkpoints" / "step-00000040")
    batch = task.batch(np.arange(40), VALIDATION)
    given = {name: batch[name] for name in saved.inputs}
    assert (given["moves"] < 0).any()
    with torch.no_grad():
        wanted = saved.call(**given)
    export_onnx(saved, tmp_path / "m.onnx", half=half)
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    got = session.run(list(saved.outputs), {name: value.numpy() for name, value in given.items()})
    for ours, theirs in zip(wanted, got, strict=True):
        np.testing.assert_allclose(
            torch.from_numpy(theirs.astype(np.float32)).flatten(),
            ours.flatten(),
            atol=tolerance,
            rtol=tolerance,
        )


def test_what_is_no_checkpoint(tmp_path: Path, trained: Path) -> None:
    configuration = json.loads((trained / "checkpoints" / "step-00000040" / "config.json").read_text())
    assert configuration["task"] == "chess_endgames"
    assert configuration["pieces"] == "KPk"
    (tmp_path / "config.json").write_text(json.dumps(configuration))
    with pytest.raises(DataError, match="holds no model of chess endgames"):
        load_pretrained(tmp_path)
