"""Tasks over shards of their samples: the same samples, the same loss, without the sources; exact in every way."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from manyhands.data.permutation import permute
from manyhands.data.shards.manifest import MANIFEST, read_manifest
from manyhands.data.shards.merge import merge
from manyhands.engine.loading import step_indices
from manyhands.engine.run import train
from manyhands.engine.world import World
from manyhands.errors import DataError, PlanError
from manyhands.plan.grids import GeneratedGrids, GridsTask, PixelModel
from manyhands.plan.schema import Data, Evaluation, LocalWork, Plan, Rounds
from manyhands.plan.tables import Table, TabularTask
from manyhands.plan.tasks import CustomTask, DummyTask
from manyhands.tasks.packing import pack
from manyhands.tasks.protocol import Task
from manyhands.tasks.registry import family_of

GRIDS = GridsTask(
    size=6,
    variants=2,
    generated=GeneratedGrids(puzzles=20, evaluation_puzzles=5),
    model=PixelModel(width=8, heads=2),
)
TABLE = TabularTask(table=Table(generated_rows=400), hidden_sizes=(4,))


def with_shards(plan: Plan, directory: Path, **task: Any) -> Plan:
    changed = plan.task.model_copy(update=task)
    return plan.model_copy(update={"data": Data(shards=str(directory)), "task": changed})


def opened(plan: Plan, directory: Path, allowed: tuple[str, ...] = ()) -> Task:
    family = family_of(plan, allowed=allowed)
    family.prepare(plan, directory)
    return family.open(plan, directory)


def digests(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.glob("*.parquet"))}


@pytest.fixture(scope="module")
def table_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("table") / "shards"
    pack(Plan(seed=3, task=TABLE), directory, processes=1, shard_rows=64)
    return directory


@pytest.mark.parametrize("kind", ["grids", "tabular", "text"])
def test_samples_are_those_of_the_task(
    tmp_path: Path, kind: str, plan_for: Callable[..., Plan], table_shards: Path
) -> None:
    """Each of them once, in the order of the seed's permutation; evaluation sets as they are; the loss alike."""
    torch.set_num_threads(1)
    plan = {"grids": Plan(seed=3, task=GRIDS), "tabular": Plan(seed=3, task=TABLE), "text": plan_for()}[kind]
    directory = table_shards if kind == "tabular" else tmp_path / "shards"
    if kind != "tabular":
        pack(plan, directory, processes=1)
    source = opened(plan, tmp_path / "source")
    sharded = opened(with_shards(plan, directory), tmp_path / "sharded")
    total = source.samples()
    assert sharded.samples() == total == read_manifest(directory).sets["training"].rows
    order = permute(np.arange(total), total, plan.seed, 0)
    for split, indices in (("training", order), *((name, None) for name in source.evaluation_sets)):
        count = source.samples(split)
        ours = sharded.batch(np.arange(count), split)
        theirs = source.batch(np.arange(count) if indices is None else indices, split)
        assert sharded.samples(split) == count
        assert list(ours) == list(theirs)
        assert all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in theirs)
    batch = source.batch(order[:8])
    torch.manual_seed(1)
    model = source.build_model().eval()
    assert sharded.loss(model, batch).mean == source.loss(model, batch).mean
    kept = sum(file.stat().st_size for file in (directory / "materials").iterdir())
    assert kept < 40_000


def test_first_weights_are_those_of_the_same_plan_without_shards(tmp_path: Path, table_shards: Path) -> None:
    plan = Plan(seed=3, task=TABLE)
    one = family_of(plan).prepare(plan, tmp_path / "one")
    over = with_shards(plan, table_shards)
    two = family_of(over).prepare(over, tmp_path / "two")
    assert one.first_weights.read_bytes() == two.first_weights.read_bytes()
    assert one.parameters == two.parameters
    assert one.samples == two.samples


def test_the_model_may_be_another_and_the_data_not(tmp_path: Path, table_shards: Path) -> None:
    plan = Plan(seed=5, task=TABLE)
    task = opened(with_shards(plan, table_shards, hidden_sizes=(7, 2)), tmp_path / "other")
    assert [len(p) for p in task.build_model().parameters()][::2] == [7, 2, 1]
    task.loss(task.build_model(), task.batch(np.arange(3))).mean.backward()
    contradicting = with_shards(plan, table_shards, target="other")
    for contradicted in (family_of(contradicting).check, lambda plan: opened(plan, tmp_path / "x")):  # type: ignore[attr-defined]
        with pytest.raises(
            PlanError, match=r"'task\.target' is 'other', and the shards in .* made with 'target'"
        ):
            contradicted(contradicting)


def test_what_cannot_be_packed(tmp_path: Path, table_shards: Path) -> None:
    with pytest.raises(PlanError, match=r"'task\.name' is 'dummy'"):
        pack(Plan(task=DummyTask()), tmp_path / "a")
    with pytest.raises(PlanError, match="shards are made of a task's own sources"):
        pack(with_shards(Plan(task=TABLE), table_shards), tmp_path / "a")
    with pytest.raises(DataError, match=r"1,000 rows are asked for, and the task has \d+ training samples"):
        pack(Plan(task=TABLE), tmp_path / "b", rows=1000)
    assert not (tmp_path / "a").exists()


def test_a_task_of_ones_own_keeps_its_materials_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = Path(sys.modules["manyhands"].__path__[0]) / "tasks" / "template" / "my_task.py"
    shutil.copyfile(template, tmp_path / "packed_task.py")
    monkeypatch.syspath_prepend(tmp_path)
    allowed = ("packed_task:FAMILY",)
    plan = Plan(seed=3, task=CustomTask(target=allowed[0], settings={"width": 4}))
    pack(plan, tmp_path / "shards", processes=1, allowed=allowed, rows=300)
    manifest = read_manifest(tmp_path / "shards")
    assert (set(manifest.materials), manifest.first_weights) == (
        {"samples.safetensors", "first.safetensors"},
        "first.safetensors",
    )
    over = with_shards(plan, tmp_path / "shards")
    task = opened(over, tmp_path / "task", allowed)
    assert task.samples() == 300
    source = opened(plan, tmp_path / "source", allowed)
    some = permute(np.arange(300), source.samples(), 3, 0)  # a part of the samples, drawn from all
    assert torch.equal(task.batch(np.arange(300))["x"], source.batch(some)["x"])
    task.loss(task.build_model(), task.batch(np.arange(4)))
    assert hasattr(family_of(over, allowed=allowed), "load_saved")
    with pytest.raises(PlanError, match=r"'task\.settings\.width' is 5, and the shards .* made with 4"):
        opened(with_shards(plan, tmp_path / "shards", settings={"width": 5}), tmp_path / "other", allowed)


def test_broken_shards_stop_or_are_left_out_and_counted(tmp_path: Path, table_shards: Path) -> None:
    directory = tmp_path / "shards"
    shutil.copytree(table_shards, directory)
    file = directory / "training-00001.parquet"
    damaged = bytearray(file.read_bytes())
    damaged[200] ^= 255
    file.write_bytes(damaged)
    plan = with_shards(Plan(seed=3, task=TABLE), directory)
    task = opened(plan, tmp_path / "stop")
    with pytest.raises(
        DataError, match=r"training-00001.parquet, row group 0, is broken: .*data\.on_broken=skip"
    ):
        task.batch(np.arange(task.samples()))
    skipping = plan.model_copy(update={"data": Data(shards=str(directory), on_broken="skip")})
    left = opened(skipping, tmp_path / "skip")
    assert left.samples() == task.samples() - 64
    assert len(left.batch(np.arange(left.samples()))["features"]) == left.samples()
    events: list[dict[str, Any]] = []
    short = skipping.model_copy(
        update={
            "local": LocalWork(steps=2, batch_size=8),
            "rounds": Rounds(total=1),
            "evaluation": Evaluation(max_batches=1),
        }
    )
    train(short, tmp_path / "run", on_event=events.append)
    (warning,) = [event["text"] for event in events if event["kind"] == "warning"]
    assert f"1 broken shards in {directory} are left out: training-00001.parquet" in warning
    record = (tmp_path / "skip" / "shards.json").read_text()
    assert '"count": 1' in record
    assert '"file": "training-00001.parquet"' in record
    assert '"group": 0' in record


def test_shards_that_changed_since_the_training_began(tmp_path: Path, table_shards: Path) -> None:
    directory = tmp_path / "shards"
    shutil.copytree(table_shards, directory)
    plan = with_shards(Plan(seed=3, task=TABLE), directory)
    opened(plan, tmp_path / "task")
    manifest = directory / MANIFEST
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(DataError, match="are others than when this training was prepared"):
        family_of(plan).open(plan, tmp_path / "task")
    manifest.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"prepared over are not in .* too: put them there again"):
        family_of(plan).open(plan, tmp_path / "task")
    (tmp_path / "elsewhere").rename(manifest)
    material = directory / "materials" / "table.json"
    material.write_text(material.read_text().replace("target", "Target"))
    with pytest.raises(DataError, match=r"table\.json is not what the manifest says"):
        opened(plan, tmp_path / "again")


def test_shards_elsewhere_are_those_that_are_read(
    tmp_path: Path, table_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not those of the preparation, which are still in place; a relative path means another place elsewhere."""
    plan = Plan(seed=3, task=TABLE)
    materials = tmp_path / "task"
    family_of(with_shards(plan, table_shards)).prepare(with_shards(plan, table_shards), materials)

    def opened_over(directory: Path | str) -> Any:
        over = with_shards(plan, Path(directory))
        return family_of(over).open(over, materials)

    shutil.copytree(table_shards, tmp_path / "copy")
    assert opened_over(tmp_path / "copy").shards.directory == tmp_path / "copy"
    pack(Plan(seed=4, task=TABLE), tmp_path / "others", processes=1)
    with pytest.raises(DataError, match=r"the shards in .*others are others than when"):
        opened_over(tmp_path / "others")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"are not in .*empty, and"):
        opened_over(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    for relative in ("others", "empty", "nothing", str(tmp_path / "gone")):
        assert opened_over(relative).shards.directory == table_shards


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_read_each_row_once_in_an_epoch(tmp_path: Path, table_shards: Path, ranks: int) -> None:
    """The same rows in the same steps, however many ranks share them; no tail is dropped, none is starved."""
    task = opened(with_shards(Plan(seed=3, task=TABLE), table_shards), tmp_path / "task")
    total, batch, seen = task.samples(), 12, []
    steps = -(-total // batch)
    worlds = [World(data_rank=rank, data_size=ranks) for rank in range(ranks)]
    of_ranks = [step_indices(task, 0, batch, steps, 3, world) for world in worlds]
    for parts in zip(*of_ranks, strict=True):
        assert {len(part) for part in parts} == {batch // ranks}
        seen += [index for part in parts for index in part.tolist()]
    one_by_one = [next(step_indices(task, step * batch, batch, 1, 3, World())) for step in range(steps)]
    assert seen == np.concatenate(one_by_one).tolist()
    assert sorted(seen[:total]) == list(range(total))
    assert seen[:total] != list(range(total))


def test_merged(tmp_path: Path, table_shards: Path, plan_for: Callable[..., Plan]) -> None:
    shutil.copytree(table_shards, tmp_path / "copy")
    with pytest.raises(DataError, match="hold the same rows: they were made from the same source"):
        merge([table_shards, tmp_path / "copy"], tmp_path / "c")
    plan = plan_for("byte")
    text = plan.task.text  # type: ignore[union-attr]
    parts = []
    for number, path in enumerate(sorted(Path(text.path).iterdir())[:2]):
        source = text.model_copy(update={"path": str(path)})
        part = plan.model_copy(update={"task": plan.task.model_copy(update={"text": source})})
        parts.append(tmp_path / f"part-{number}")
        pack(part, parts[-1], processes=1)
    merged = merge(parts, tmp_path / "merged")
    counts = [read_manifest(part).sets["training"].rows for part in parts]
    assert merged.sets["training"].rows == sum(counts)
    task = opened(with_shards(plan, tmp_path / "merged", text=merged_text(merged.task)), tmp_path / "task")
    second = opened(
        with_shards(plan, parts[1], text=merged_text(read_manifest(parts[1]).task)), tmp_path / "second"
    )
    ours = task.batch(np.arange(counts[0], sum(counts)))["tokens"]
    assert torch.equal(ours, second.batch(np.arange(counts[1]))["tokens"])
    with pytest.raises(DataError, match=r"merge: task\.name is"):
        merge([parts[0], table_shards], tmp_path / "d")
    with pytest.raises(DataError, match="at least two different directories"):
        merge([parts[0], parts[0]], tmp_path / "d")


def merged_text(task: dict[str, Any]) -> Any:
    from manyhands.plan.language_model import TextSource

    return TextSource(**task["text"])


# ------------------------------------------------------------------------------ killed
@pytest.mark.slow
@pytest.mark.chaos
def test_killed_in_the_middle_the_same_command_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 of the command: its processes end with it, what is made stays as it is, and nothing is half there."""
    words = [
        "task=grids",
        "task.size=6",
        "task.generated.puzzles=300",
        "task.generated.evaluation_puzzles=20",
    ]
    command = [str(Path(sys.executable).with_name("manyhands")), "shards", "pack", "--rows-per-shard", "500"]
    environment = {**os.environ, "MANYHANDS_HOME": str(tmp_path / "home")}

    def run(out: str, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*command, "--out", str(tmp_path / out), *words, *more],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    cut = run("cut", "--processes", "2")
    record = tmp_path / "cut" / ".making" / "done.jsonl"
    end = time.monotonic() + 120
    while not record.is_file() or record.read_text().count("\n") < 3:
        assert cut.poll() is None, cut.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)
    children = psutil.Process(cut.pid).children(recursive=True)
    assert len(children) >= 2
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "cut").glob("*.parquet")}
    assert len(kept) >= 3
    assert not (tmp_path / "cut" / MANIFEST).exists()

    again = run("cut", "--processes", "1")
    assert "rows kept of an earlier start" in again.communicate(timeout=200)[1]
    whole = run("whole", "--processes", "2")
    whole.communicate(timeout=200)
    assert (again.returncode, whole.returncode) == (0, 0)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    unchanged = [n for n, made in kept.items() if (tmp_path / "cut" / n).stat().st_mtime_ns == made]
    assert len(unchanged) >= 3
    assert not (tmp_path / "cut" / ".making").exists()
    one, two = (read_manifest(tmp_path / name) for name in ("cut", "whole"))
    assert one.sets == two.sets
    assert one.materials == two.materials
