"""A client's worker process from inside: what a second process makes of what a killed one has left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from manyhands.coordination.effects import Work
from manyhands.coordination.types import Assignment, IndexRange, OuterTerms, RoundTerms
from manyhands.engine.settings import Logging
from manyhands.node.workers.client_worker import ClientWorker, _work
from manyhands.node.workers.prepare_worker import prepare
from manyhands.plan.descriptor import Material, Parameter, RunDescriptor
from manyhands.plan.resolve import plan_hash
from manyhands.plan.schema import Plan


class NoChannel:
    """Nothing is abandoned; what the worker says of itself is kept."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []

    def abandoned(self, _assignment: str) -> bool:
        return False

    def notify(self, **notice: Any) -> None:
        self.said.append(notice)


@pytest.fixture
def made(tmp_path: Path, tiny_gpt: dict[str, Any]) -> dict[str, Any]:
    """A prepared run: what a worker is opened with, and the first snapshot."""
    choices = {"preset": "diloco", "codec": {"name": "int8", "error_feedback": True}}
    plan = Plan.parse({**tiny_gpt, **choices, "run_id": "run"})
    materials = tmp_path / "materials"
    materials.mkdir()
    found = prepare(plan.model_dump(mode="json"), str(materials), [])
    nothing = Material(blob="0" * 64, size_bytes=0)
    descriptor = RunDescriptor(
        run_id="run",
        plan=plan,
        plan_hash=plan_hash(plan),
        samples=found["samples"],
        parameters=tuple(Parameter.model_validate(p) for p in found["parameters"]),
        materials={},
        first_snapshot=nothing,
        first_fingerprint=found["fingerprint"],
        server_key="0" * 64,
    )
    return {"descriptor": descriptor, "directory": tmp_path, **found}


def _started(made: dict[str, Any], **more: Any) -> ClientWorker:
    worker = ClientWorker(NoChannel())  # type: ignore[arg-type]
    threads = torch.get_num_threads()
    worker.open(
        made["descriptor"].model_dump(mode="json"),
        str(made["directory"]),
        "cpu",
        1,
        None,
        allowed_tasks=[],
        **more,
    )
    worker.load(made["first_snapshot"], 0, [made["fingerprint"]], [])
    torch.set_num_threads(threads)
    return worker


def _assignment(identifier: str, round_number: int = 0, first_step: int = 0) -> Any:
    work = Work(
        assignment=Assignment(
            id=identifier,
            round=round_number,
            client="c" * 64,
            steps=2,
            batch_size=4,
            ranges=(IndexRange(epoch=0, start=0, stop=8),),
            weight=1,
            seed=7,
        ),
        terms=RoundTerms(
            round=round_number,
            fragment=0,
            first_step=first_step,
            learning_rates=(1e-3,) * 4,
            outer=OuterTerms(lr=0.7),
            deadline_ms=0,
        ),
    )
    return _work.dump_python(work, mode="json")


def test_work_that_was_done_is_not_done_again_after_a_death(made: dict[str, Any], tmp_path: Path) -> None:
    """Killed after the local state was saved, before the node had the answer: the same claims and bytes."""
    first = _started(made)
    path = tmp_path / "0-0.safetensors"
    claims = first.work(_assignment("0-0"), str(path))
    assert claims["start"] == "fresh"
    assert math.isfinite(claims["loss"])
    sent = path.read_bytes()
    second = _started(made)
    assert second.work(_assignment("0-0"), str(path)) == claims
    assert path.read_bytes() == sent
    after = second.work(_assignment("1-1", 1), str(tmp_path / "1-1.safetensors"))
    # Its pending contribution was never settled, so error feedback is not to be trusted.
    assert after["start"] == "fresh"


def test_claims_are_whole_at_any_moment(made: dict[str, Any], tmp_path: Path) -> None:
    """Those of the next work take the place of the old ones at once: they are written aside."""
    worker = _started(made)
    worker.work(_assignment("0-0"), str(tmp_path / "0-0.safetensors"))
    kept = tmp_path / "claims.json"
    with kept.open() as before:
        worker.work(_assignment("1-1", 1), str(tmp_path / "1-1.safetensors"))
        assert json.load(before)["assignment"] == "0-0"
    assert json.loads(kept.read_text())["assignment"] == "1-1"


def test_work_is_done_again_where_its_end_was_not_saved(made: dict[str, Any], tmp_path: Path) -> None:
    """Killed before the local state was saved: from the same start to the same bits."""
    path = tmp_path / "0-0.safetensors"
    claims = _started(made).work(_assignment("0-0"), str(path))
    sent = path.read_bytes()
    (tmp_path / "local.safetensors").unlink()
    again = _started(made).work(_assignment("0-0"), str(path))
    assert {**again, "work_ms": 0} == {**claims, "work_ms": 0}
    assert path.read_bytes() == sent


def test_a_local_state_that_cannot_be_read_is_a_fresh_start(made: dict[str, Any], tmp_path: Path) -> None:
    _started(made).work(_assignment("0-0"), str(tmp_path / "0-0.safetensors"))
    (tmp_path / "local.safetensors").write_bytes(b"broken")
    claims = _started(made).work(_assignment("0-1"), str(tmp_path / "0-1.safetensors"))
    assert claims["start"] == "fresh"


def test_figures_of_the_training_go_where_they_were_asked_for(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms to the node, at steps of the run; all of it to Weights & Biases, in whose file they are at the end."""
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # what another test has set holds for the whole process
    monkeypatch.setenv("WANDB_MODE", "offline")
    logging = Logging(optim_stats_steps=3, wandb_project="mine", wandb_group="run")
    worker = _started(made, logging=logging.model_dump(mode="json"))
    plain = _started(made).work(_assignment("0-0"), str(tmp_path / "plain.safetensors"))
    (tmp_path / "local.safetensors").unlink()
    for number in range(2):
        path = tmp_path / f"{number}-{number}.safetensors"
        claims = worker.work(_assignment(f"{number}-{number}", number, first_step=2 * number), str(path))
        if number == 0:
            assert claims["loss"] == plain["loss"], "looking changes nothing"
    channel: Any = worker._channel
    (stats,) = [notice["event"] for notice in channel.said if "event" in notice]
    assert (stats["kind"], stats["step"]) == ("optimizer_stats", 3)
    assert stats["tensors"]["transformer.wte.weight"].keys() == {
        "weight",
        "gradient",
        "exp_avg",
        "exp_avg_sq",
    }
    worker.finish()
    assert [notice for notice in channel.said if notice.get("event", {}).get("kind") == "warning"] == []
    wandb.teardown()  # its service writes the file to its end, as when the process ends
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = file.read_bytes()
    for word in (b"training/loss", b"optimizer/gradient/transformer.wte.weight", b"mine"):
        assert word in written
