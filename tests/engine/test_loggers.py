"""Tensorboard and wandb (offline): what a training told them, read back from their files; and loggers that fail."""

from __future__ import annotations

import itertools
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyhands.engine.events import Events
from manyhands.engine.loggers import Aside, figures, logging_to
from manyhands.engine.run import train
from manyhands.engine.settings import EngineSettings, Logging
from manyhands.errors import ManyhandsError, MissingExtra

KEY = "c0ffee00" * 5
STEP = {"kind": "step", "step": 10, "loss": 2.5, "learning_rate": 0.1, "gradient_norm": None, "mfu": None}


def test_the_figures_of_each_kind_of_event() -> None:
    assert figures(STEP) == {"training/loss": 2.5, "training/learning_rate": 0.1}
    evaluation = {"kind": "evaluation", "step": 1, "set": "mirrors", "loss": 1, "metrics": {"exact": 0.5}}
    assert figures(evaluation) == {"mirrors/loss": 1.0, "mirrors/exact": 0.5}
    stats = {"kind": "optimizer_stats", "step": 1, "tensors": {"a.b": {"weight": 1.5, "gradient": None}}}
    assert figures(stats) == {"optimizer/weight/a.b": 1.5}
    assert figures({"kind": "saved", "step": 1, "checkpoint": "/x"}) == {}


# ------------------------------------------------------------------------------------------- a whole training
@pytest.fixture
def png(tmp_path: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (3, 2), (255, 0, 0)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_tensorboard_has_every_figure_the_stats_and_the_pictures(
    world: Any, tmp_path: Path, png: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logging = Logging(every_steps=4, tensorboard=True, optim_stats_steps=6)
    events: list[dict[str, Any]] = []
    train(world.plan, tmp_path / "run", settings=EngineSettings(logging=logging), on_event=events.append)
    with Events(None) as more, logging_to(more, logging, world.plan, tmp_path / "run"):
        more.emit("resumed", step=8, checkpoint="")
        more.emit("evaluation", step=9, set="grids", loss=0.5, metrics={"exact": 0.25}, picture=str(png))
    kept = accumulator.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    told = {e["step"]: e["loss"] for e in events if e["kind"] == "step"}
    assert {s.step: s.value for s in kept.Scalars("training/loss")} == pytest.approx(
        {step: loss for step, loss in told.items() if step <= 8}  # later ones were done again
    )
    assert [s.step for s in kept.Scalars("validation/loss")] == [0, 6]
    assert [s.step for s in kept.Scalars("optimizer/gradient/transformer.wte.weight")] == [6]
    assert [s.value for s in kept.Scalars("grids/exact")] == [0.25]
    (image,) = kept.Images("grids/predictions")
    assert (image.width, image.height, image.step) == (3, 2, 9)
    assert image.encoded_image_string == png.read_bytes()


def test_wandb_has_every_figure_the_stats_and_the_pictures_and_no_secret(
    world: Any, tmp_path: Path, png: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    logging = Logging(every_steps=4, wandb_project="mine", wandb_group="us", optim_stats_steps=6)
    events: list[dict[str, Any]] = []
    run = tmp_path / "run"
    train(world.plan, run, settings=EngineSettings(logging=logging), on_event=events.append)
    assert capfd.readouterr().out == ""
    with Events(None, [events.append]) as more, logging_to(more, logging, world.plan, run):
        more.emit("evaluation", step=13, set="grids", loss=0.5, metrics={}, picture=str(png))
    assert [e for e in events if e["kind"] == "warning"] == []
    wandb.teardown()  # its service writes the files to their ends, as when the process ends
    first, second = sorted(run.glob("wandb/offline-run-*"))
    header, rows = read_offline(next(first.glob("*.wandb")))
    name = (run / "wandb-run-id").read_text().strip()
    assert (header.run_id, header.project, header.display_name, header.run_group) == (
        name, "mine", "run", "us",
    )  # fmt: skip
    told = {e["step"]: e["loss"] for e in events if e["kind"] == "step"}
    assert {row["step"]: row["training/loss"] for row in rows if "training/loss" in row} == told
    assert [row["step"] for row in rows if "validation/loss" in row] == [0, 6, 12]
    assert [row["step"] for row in rows if "optimizer/gradient/transformer.wte.weight" in row] == [6, 12]
    header, rows = read_offline(next(second.glob("*.wandb")))
    assert header.run_id == name, "a training that resumes goes on in the same run"
    assert rows[0]["grids/predictions.width"] == 3
    assert len(list(second.glob("files/media/images/grids/*.png"))) == 1
    leaks = [file for file in run.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]
    assert leaks == []


def read_offline(file: Path) -> tuple[Any, list[dict[str, Any]]]:
    """The run's record and the rows of an offline run: protocol buffers in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = [Record.FromString(data) for data in leveldb_records(file.read_bytes())]
    (run,) = [record.run for record in records if record.HasField("run")]
    rows = [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    return run, rows


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Blocks of 32 KiB of records: checksum, length, kind (1 whole, 2 first, 3 middle, 4 last); a header first."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


# ------------------------------------------------------------------------------------------- what goes wrong
def test_a_missing_package_names_the_extra(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, logging in {
        "tensorboard": Logging(tensorboard=True),
        "wandb": Logging(wandb_project="mine"),
    }.items():
        for module in ("", ".summary", ".summary.writer", ".summary.writer.event_file_writer"):
            monkeypatch.setitem(__import__("sys").modules, package + module, None)
        with pytest.raises(MissingExtra, match=rf"pip install 'manyhands\[{package}\]'"):
            train(world.plan, tmp_path / package, settings=EngineSettings(logging=logging))


def test_wandb_without_a_key_says_so_at_the_start(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb.teardown()
    with pytest.raises(ManyhandsError, match="WANDB_API_KEY, or set WANDB_MODE=offline"):
        train(world.plan, tmp_path / "run", settings=EngineSettings(logging=Logging(wandb_project="mine")))


class Broken:
    """Fails, or waits for ever, at its second event."""

    def __init__(self, error: Exception | None) -> None:
        self._error, self._seen, self.wait = error, 0, threading.Event()

    def write(self, _event: dict[str, Any]) -> None:
        self._seen += 1
        if self._seen == 2:
            if self._error is not None:
                raise self._error
            self.wait.wait(60)

    def close(self) -> None:
        pass


def test_a_logger_that_fails_is_said_once_and_without_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    told: list[str] = []
    aside = Aside("wandb", lambda: Broken(OSError(f"bad key {KEY}\nmore")), told.append)
    for number in range(5):
        aside({"kind": "step", "step": number})
    aside._thread.join(10)
    aside({"kind": "step", "step": 6})
    aside.close()
    assert told == ["wandb has failed and gets nothing more (OSError: bad key ***)"]


def test_nobody_waits_for_a_logger_that_hangs() -> None:
    told: list[str] = []
    broken = Broken(None)
    aside = Aside("wandb", lambda: broken, told.append)
    for number in range(5):
        aside({"kind": "step", "step": number})
    aside.close(within_s=0.2)
    assert told == [
        "wandb has failed and gets nothing more (it has not written everything 0.2 s after the end)"
    ]
    broken.wait.set()


def test_a_logger_that_is_far_behind_is_given_up() -> None:
    told: list[str] = []
    broken = Broken(None)
    aside = Aside("tensorboard", lambda: broken, told.append)
    for number in itertools.takewhile(lambda _: not told, itertools.count()):
        aside({"kind": "step", "step": number})
    assert told == ["tensorboard has failed and gets nothing more (it is 10000 events behind)"]
    broken.wait.set()


def test_a_training_goes_on_without_a_logger_that_cannot_write(world: Any, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tensorboard").write_text("in the way")
    events: list[dict[str, Any]] = []
    settings = EngineSettings(logging=Logging(tensorboard=True))
    result = train(world.plan, tmp_path / "run", settings=settings, on_event=events.append)
    assert result.steps == 12
    (warning,) = [e for e in events if e["kind"] == "warning"]
    assert warning["text"].startswith("tensorboard has failed and gets nothing more (")
