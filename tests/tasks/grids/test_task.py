from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from manyhands.errors import DataError, PlanError
from manyhands.plan.compose import compose
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import DummyTask, GridSet
from manyhands.tasks.grids import load_pretrained
from manyhands.tasks.grids.model import PADDING
from manyhands.tasks.grids.task import FAMILY, Grids
from manyhands.tasks.protocol import TRAINING, VALIDATION, Prepared, Task, Warns

REAL = Path(__file__).parents[4] / "shared" / "data" / "arc-agi"
MATERIALS = {
    "grids.json",
    "puzzles.jsonl",
    "training.cells.npy",
    "training.puzzles.npy",
    "validation.cells.npy",
    "validation.puzzles.npy",
}
GRIDS = ("inputs", "targets", "context_inputs", "context_outputs")


def test_materials_weights_and_table_belong_together(
    prepared: tuple[Plan, Prepared, Path], task: Grids
) -> None:
    _, made, directory = prepared
    assert set(made.materials) == MATERIALS
    assert all(path == directory / name and path.is_file() for name, path in made.materials.items())
    weights = load_file(made.first_weights)
    assert {p.name: p.shape for p in made.parameters} == {n: tuple(t.shape) for n, t in weights.items()}
    assert [n for n, _ in task.build_model().named_parameters()] == [p.name for p in made.parameters]
    assert task.samples() == made.samples == 12 * 4 * 8
    assert task.samples(VALIDATION) == 5
    assert (task.evaluation_sets, task.unit, task.tokens_per_sample()) == (("validation",), "pixels", 64)
    lines = [json.loads(line) for line in (directory / "puzzles.jsonl").read_text().splitlines()]
    assert [(line["set"], line["puzzle"]) for line in lines] == [
        *((TRAINING, i) for i in range(12)),
        *((VALIDATION, i) for i in range(5)),
    ]
    assert all(
        line["rules"] and line["seed"] == [7, line["set"] != TRAINING, line["puzzle"]] for line in lines
    )


def test_preparing_twice_gives_the_same_bytes(
    prepared: tuple[Plan, Prepared, Path], plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan, made, directory = prepared
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert FAMILY.prepare(plan, tmp_path).parameters == made.parameters
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    for name in (*MATERIALS, made.first_weights.name):
        assert (tmp_path / name).read_bytes() == (directory / name).read_bytes()
    other = FAMILY.prepare(plan_for(seed=8), tmp_path / "other")
    for name in ("training.cells.npy", "first.safetensors"):
        assert (tmp_path / "other" / name).read_bytes() != (directory / name).read_bytes()
    assert other.samples == made.samples


def test_a_batch_is_a_function_of_its_indices(task: Grids) -> None:
    indices = np.array([0, 383, 100, 48])
    batch = task.batch(indices)
    assert {name: tuple(t.shape) for name, t in batch.items()} == {
        "inputs": (4, 8, 8),
        "targets": (4, 8, 8),
        "context_inputs": (4, 3, 8, 8),
        "context_outputs": (4, 3, 8, 8),
        "context_mask": (4, 3),
        "sample": (4,),
        "puzzle": (4,),
    }
    np.random.seed(5)
    torch.manual_seed(5)
    for row, index in enumerate(indices):
        alone = task.batch(np.array([index]))
        assert all(torch.equal(alone[name][0], batch[name][row]) for name in batch)
    assert batch["context_mask"].all()
    assert batch["puzzle"].tolist() == [0, 11, 1, 0]
    for index in (-1, task.samples()):
        with pytest.raises(DataError, match="384 samples of 'training'"):
            task.batch(np.array([index]))
    with pytest.raises(DataError, match="no set 'test' of puzzles; there are training, validation"):
        task.batch(np.array([0]), "test")


def test_each_pair_is_asked_in_turn_beside_the_others(task: Grids) -> None:
    cells = torch.from_numpy(np.array(task.sets[TRAINING].arrays.cells)).long()
    batch = task.batch(np.arange(48))
    for sample in range(48):
        puzzle, asked = divmod(sample, 4)
        pairs = [4 * puzzle + i for i in range(4) if i != asked]
        assert torch.equal(batch["inputs"][sample], cells[sample, 0])
        assert torch.equal(batch["targets"][sample], cells[sample, 1])
        assert torch.equal(batch["context_inputs"][sample], cells[pairs, 0])
        assert torch.equal(batch["context_outputs"][sample], cells[pairs, 1])


def test_variants_are_symmetries_with_other_colours(task: Grids) -> None:
    """Of one sample, all grids alike: what can be undone for one is undone for the others by the same."""
    plain = task.batch(np.array([3]))
    seen = set()
    for variant in range(1, 8):
        changed = task.batch(np.array([3 + 48 * variant]))
        assert changed["puzzle"].tolist() == plain["puzzle"].tolist()
        places = set()
        for turned in range(8):
            undone = [_undone(changed[name][0], turned) for name in ("inputs", "targets")]
            colours = _colours(undone, [plain[name][0] for name in ("inputs", "targets")])
            if colours is not None and colours[0] == 0 and colours[PADDING] == PADDING:
                places.add(turned)
        assert places, "no symmetry and exchange of colours explains it"
        seen.add(min(places))
        counts = [
            sorted(b["context_inputs"].flatten().bincount(minlength=11).tolist()) for b in (changed, plain)
        ]
        assert counts[0] == counts[1]
    assert len(seen) > 1


def _undone(padded: torch.Tensor, symmetry: int) -> torch.Tensor:
    """The grid inside, turned and reflected by one of the eight symmetries."""
    inside = padded != PADDING
    grid = padded[: int(inside[:, 0].sum()), : int(inside[0].sum())]
    grid = torch.rot90(grid, symmetry % 4)
    return F.pad(grid.mT if symmetry >= 4 else grid, (0, 8, 0, 8), value=PADDING)[:8, :8]


def _colours(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> dict[int, int] | None:
    """The exchange of colours that makes the ones the others, if there is one."""
    pairs = {
        (int(a), int(b))
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x.flatten(), y.flatten(), strict=True)
    }
    found = dict(pairs)
    return found if len(found) == len(pairs) == len(set(found.values())) else None


def test_without_augmentation_an_epoch_has_each_pair_once(
    plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan = plan_for(variants=1)
    assert FAMILY.prepare(plan, tmp_path).samples == 48
    assert FAMILY.open(plan, tmp_path).samples() == 48


def test_the_loss_is_over_all_pixels_in_fp32(task: Grids) -> None:
    batch, model = task.batch(np.array([1, 2])), task.build_model()
    assert model.training
    loss = task.loss(model, batch)
    names = ("inputs", "context_inputs", "context_outputs", "context_mask")
    logits = model(**{name: batch[name] for name in names}).double()
    expected = -F.log_softmax(logits, -1).gather(-1, batch["targets"][..., None]).mean()
    assert loss.mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.count == 2 * 64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert task.loss(model, batch).mean.dtype == torch.float32


def test_it_learns(task: Grids) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for step in range(40):
        loss = task.loss(model, task.batch(np.arange(step * 8, step * 8 + 8) % task.samples())).mean
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(np.log(11), rel=0.1)
    assert np.mean(losses[-5:]) < 0.4 * losses[0]


def test_arc_files_as_sets(plan_for: Callable[..., Plan], arc: Path, tmp_path: Path) -> None:
    (arc / "c.json").write_text("?")
    sets = (GridSet(name="arc", path=str(arc)), GridSet(name="more", path="generated"))
    plan = plan_for(training=str(arc), evaluation=sets, on_broken="skip", context=2)
    made = FAMILY.prepare(plan, tmp_path / "materials")
    assert made.samples == 8 * 8
    record = json.loads(made.materials["grids.json"].read_text())
    assert [part["name"] for part in record["sets"]] == ["training", "arc", "more"]
    assert list(record["sets"][1]["broken"]) == ["c.json"]
    assert record["sets"][1]["too_large"] == ["large.json"]
    task: Task = FAMILY.open(plan, tmp_path / "materials")
    assert isinstance(task, Warns)
    assert "arc: 1 files are left out as broken: c.json" in task.warnings
    assert "arc: 1 files are left out as larger than 8: large.json" in task.warnings
    assert task.evaluation_sets == ("arc", "more")
    assert [task.samples(name) for name in ("training", "arc", "more")] == [64, 3, 5]

    asked = task.batch(np.arange(3), "arc")  # a.json asks 8; b.json 3 and 4, and shows 1 and 2 alone
    assert asked["inputs"][:, 0, 0].tolist() == [8, 3, 4]
    assert asked["targets"][0].tolist() == [[9, 9, *[10] * 6]] * 3 + [[10] * 8] * 5
    assert asked["puzzle"].tolist() == [0, 1, 1]
    assert asked["context_inputs"][:, :, 0, 0].tolist() == [[5, 6], [1, 2], [1, 2]]
    shown = task.batch(np.array([7]))  # in training the official test pair is shown and asked like any other
    assert (shown["inputs"][0, 0, 0], shown["context_inputs"][0, :, 0, 0].tolist()) == (4, [1, 2])
    with pytest.raises(DataError, match=r"c\.json"):
        FAMILY.prepare(plan_for(training=str(arc)), tmp_path / "stopped")


def test_pairs_that_are_missing_are_masked(plan_for: Callable[..., Plan], arc: Path, tmp_path: Path) -> None:
    plan = plan_for(evaluation=(GridSet(name="arc", path=str(arc)),), context=4)
    FAMILY.prepare(plan, tmp_path)
    task = FAMILY.open(plan, tmp_path)
    batch = task.batch(np.arange(3), "arc")
    assert batch["context_mask"].tolist() == [[True] * 3 + [False]] + [[True, True, False, False]] * 2
    assert (batch["context_inputs"][0, 3] == PADDING).all()
    loss = task.metrics("arc").add(task.build_model().eval(), batch)
    assert torch.isfinite(loss.mean)


def test_opening_needs_whole_materials_of_this_plan(
    prepared: tuple[Plan, Prepared, Path], plan_for: Callable[..., Plan], tmp_path: Path
) -> None:
    plan, made, directory = prepared
    for name in sorted(MATERIALS - {"puzzles.jsonl"}):
        for content in (None, b"", b"{broken", np.lib.format.magic(1, 0), _pickled(tmp_path)):
            copy = tmp_path / "copy"
            copy.mkdir(exist_ok=True)
            for other, path in made.materials.items():
                (copy / other).write_bytes(path.read_bytes())
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
            with pytest.raises(DataError, match=name.replace(".", r"\.")):
                FAMILY.open(plan, copy)
    with pytest.raises(DataError, match="size 8 and sets training, validation are not those of the plan"):
        FAMILY.open(plan_for(size=9), directory)


def _pickled(directory: Path) -> bytes:
    np.save(directory / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    return (directory / "pickled.npy").read_bytes()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("training.cells.npy", np.zeros((48, 2, 8, 8), dtype=np.float32), "float32"),
        ("training.cells.npy", np.zeros((48, 2, 9, 8), dtype=np.uint8), r"\[48, 2, 9, 8\], not uint8"),
        ("training.cells.npy", np.full((48, 2, 8, 8), 11, dtype=np.uint8), "values up to 11"),
        ("training.cells.npy", np.full((48, 2, 8, 8), 10, dtype=np.uint8), "an empty grid"),
        ("training.cells.npy", np.zeros((47, 2, 8, 8), dtype=np.uint8), "within the 47 pairs"),
        ("training.puzzles.npy", np.zeros((12, 3), dtype=np.int64), "int64"),
        ("training.puzzles.npy", np.array([[-1, 4, 1]], dtype=np.int32), "within the 48 pairs"),
        ("training.puzzles.npy", np.array([[0, 1, 1]], dtype=np.int32), "within the 48 pairs"),
    ],
)
def test_arrays_from_elsewhere_are_checked(
    prepared: tuple[Plan, Prepared, Path], tmp_path: Path, name: str, array: np.ndarray, message: str
) -> None:
    plan, made, _ = prepared
    for other, path in made.materials.items():
        (tmp_path / other).write_bytes(path.read_bytes())
    np.save(tmp_path / name, array)
    with pytest.raises(DataError, match=message):
        FAMILY.open(plan, tmp_path)


def test_what_a_person_keeps_can_be_loaded(task: Grids, tmp_path: Path) -> None:
    model = task.build_model().eval()
    task.save_pretrained({name: p.detach() for name, p in model.named_parameters()}, tmp_path / "kept")
    loaded = load_pretrained(tmp_path / "kept")
    batch = task.batch(np.arange(2), VALIDATION)
    assert torch.equal(task.loss(loaded, batch).mean, task.loss(model, batch).mean)
    (tmp_path / "kept" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="holds no model of the grids task"):
        load_pretrained(tmp_path / "kept")


def test_the_command_line_says_it() -> None:
    plan = compose(["task=grids", "task.evaluation=[{name:arc,path:/data/a},{name:own,path:generated}]"])
    assert plan.task.evaluation == (  # type: ignore[union-attr]
        GridSet(name="arc", path="/data/a"),
        GridSet(name="own", path="generated"),
    )
    assert compose(["task=grids", "task.generated.rules=[mirror]"]).task.generated.rules == ("mirror",)  # type: ignore[union-attr]


def test_a_plan_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="'dummy'"):
        FAMILY.prepare(Plan(task=DummyTask()), tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason=f"ARC's files are not in {REAL}")
def test_arc_itself(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    sets = (GridSet(name="evaluation", path=str(REAL / "evaluation")),)
    plan = plan_for(training=str(REAL / "training"), evaluation=sets, size=30)
    made = FAMILY.prepare(plan, tmp_path)
    task = FAMILY.open(plan, tmp_path)
    assert task.samples("evaluation") == 419
    assert made.samples == task.samples() == 8 * 1718
    batch = task.batch(np.array([0, 418]), "evaluation")
    metrics = task.metrics("evaluation")
    metrics.add(task.build_model().eval(), batch)
    assert 0 <= metrics.values()["pixel_accuracy"] <= 1
