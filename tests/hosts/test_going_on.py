"""What a training finds of its name here and on a real host, and the checkpoint that it goes on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from manyhands.engine.configuration import configure
from manyhands.errors import DataError, PlanError, Refused
from manyhands.hosts.agent import Agent
from manyhands.hosts.going_on import Found, check_here, origin_of
from manyhands.hosts.record import Part, Record, recorded
from manyhands.plan.resolve import plan_hash
from manyhands.ui.bench.loopback_host import LoopbackHost

Begun = Callable[..., tuple[Record, list[str]]]
ENDED = {"state": "ended", "exit_code": 0}


BEGUN = ("task=tabular", "task.table.generated_rows=200", "local.steps=5", "local.batch_size=8")  # by `begun`
MADE_WITH = plan_hash(configure(BEGUN).plan)


def kept(directory: Path, *steps: int, events: str = "", made_with: str = MADE_WITH) -> Path:
    """A training of this machine, with checkpoints in two files."""
    for step in steps:
        checkpoint = directory / "checkpoints" / f"step-{step:08}"
        (checkpoint / "state").mkdir(parents=True)
        record = {"version": 2, "step": step, "sample": 0, "plan_hash": made_with}
        (checkpoint / "training.json").write_text(json.dumps(record))
        (checkpoint / "state" / "model.safetensors").write_bytes(b"weights" * (step % 100))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "events.jsonl").write_text(events)
    return directory


def resumed(record: Record) -> str:
    """What the program on the host was told."""
    job = json.loads((Path(record.parts[0].directory) / "job.json").read_text())
    return str(job["command"][job["command"].index("--resume") + 1])


def end(directory: Path) -> None:
    record = recorded(directory)
    assert record is not None
    record.with_ending("server1", ENDED).keep_in(directory)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


# ---------------------------------------------------------------------------------------- the checkpoint
def test_the_named_checkpoint_is_sent_with_its_events(host: LoopbackHost, begun: Begun) -> None:
    here = kept(host.manyhands_home / "runs" / "older", 5, 10, events='{"kind": "step"}\n')
    record, _ = begun(here, f"resume={here / 'checkpoints' / 'step-00000005'}")
    there = Path(record.parts[0].directory)
    assert names(there / "checkpoints") == ["step-00000005"]
    for file in ("training.json", "state/model.safetensors"):
        sent = there / "checkpoints" / "step-00000005" / file
        assert sent.read_bytes() == (here / "checkpoints" / "step-00000005" / file).read_bytes()
    assert resumed(record) == str(there / "checkpoints" / "step-00000005")
    assert (there / "events.jsonl").read_text() == '{"kind": "step"}\n'
    assert names(here / "checkpoints") == ["aside", "step-00000005"]


def test_a_course_that_is_left_is_left_on_both_sides(host: LoopbackHost, begun: Begun) -> None:
    """Nothing of it can come back here under the names of the new one."""
    here = kept(host.manyhands_home / "runs" / "left", 5, 10)
    there = kept(host.home / "manyhands" / "runs" / "left", 5, 10, 15)
    for directory in (here, there):
        (directory / "exports").mkdir()
        for step in (5, 10):
            (directory / "exports" / f"step-{step:08}.onnx").write_bytes(b"graph")
            (directory / "exports" / f"step-{step:08}.onnx.json").write_text("{}")
    named = f"resume={here / 'checkpoints' / 'step-00000005'}"
    (there / "checkpoints" / "step-00000005" / "training.json").write_text("of another")
    with pytest.raises(PlanError, match="another step-00000005"):
        begun(here, named)
    assert "step-00000015" in names(there / "checkpoints"), "what is refused changes nothing"
    shutil.copy(
        here / "checkpoints" / "step-00000005" / "training.json", there / "checkpoints" / "step-00000005"
    )
    _, told = begun(here, named)
    assert "server1: set aside, into checkpoints/aside: step-00000010, step-00000015" in told
    for directory in (here, there):
        assert names(directory / "checkpoints") == ["aside", "step-00000005"]
        assert names(directory / "exports") == ["step-00000005.onnx", "step-00000005.onnx.json"]
    assert names(there / "checkpoints" / "aside") == ["step-00000010", "step-00000015"]


def test_a_newer_one_here_is_sent_to_a_host_that_has_older_ones(host: LoopbackHost, begun: Begun) -> None:
    here = kept(host.manyhands_home / "runs" / "behind", 99_999_999)
    record, _ = begun(here, "resume=latest")
    end(here)
    kept(here, 100_000_000)  # nine digits: the newest by number, not by name
    record, _ = begun(here, f"resume={here}")
    there = Path(record.parts[0].directory)
    assert names(there / "checkpoints") == ["step-100000000", "step-99999999"]
    assert resumed(record) == str(there / "checkpoints" / "step-100000000")


def test_a_checkpoint_that_was_cut_off_is_none(
    host: LoopbackHost, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = kept(host.manyhands_home / "runs" / "cut", 5)
    ask = Agent.ask

    async def cut(self: Agent, op: str, body: bytes = b"", **fields: object) -> dict[str, object]:
        if op == "partial" and str(fields["path"]).endswith("training.json"):
            raise DataError("cut off")
        return await ask(self, op, body, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(Agent, "ask", cut)
        with pytest.raises(DataError, match="cut off"):
            begun(here, "resume=latest")
    there = host.home / "manyhands" / "runs" / "cut" / "checkpoints"
    assert names(there) == [".step-00000005.sent"]
    begun(here, "resume=latest")
    assert names(there) == ["step-00000005"]
    assert (there / "step-00000005" / "state" / "model.safetensors").is_file()


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    here = kept(tmp_path / "run", 5, 10)
    there = Found(checkpoints={"step-00000010": {}, "step-00000020": {}}, events=0)
    assert origin_of(here, "latest", there).name == "step-00000020"
    assert origin_of(here, str(here), there).here is None
    assert origin_of(here, str(here / "checkpoints"), Found(checkpoints={}, events=0)).name == "step-00000010"
    assert (
        origin_of(tmp_path / "other", str(here), there).name == "step-00000010"
    )  # that training's, not this one's
    assert origin_of(here, str(here / "checkpoints" / "step-00000020"), there).here is None
    with pytest.raises(DataError, match="there is no such checkpoint, here or on the host"):
        origin_of(here, str(here / "checkpoints" / "step-00000030"), there)
    with pytest.raises(DataError, match="no checkpoint to go on from, here or on the host"):
        origin_of(tmp_path / "none", "latest", Found(checkpoints={}, events=0))


# ---------------------------------------------------------------------------------------- what is not overwritten
def test_another_training_here_is_refused(tmp_path: Path) -> None:
    check_here(tmp_path / "none", None)
    for step, events in ((1, ""), (0, "{}\n")):
        here = kept(tmp_path / f"local-{step}", *([step] if step else []), events=events)
        with pytest.raises(PlanError, match="has a training already: go on with it"):
            check_here(here, None)
        check_here(here, "latest")
    record = Record(run="r", parts=(Part(host="server1", directory="/r"),))
    record.keep_in(tmp_path / "there")
    for resume in (None, "latest"):
        with pytest.raises(PlanError, match="its training on server1 goes on, or nobody has seen its end"):
            check_here(tmp_path / "there", resume)
    record.with_ending("server1", ENDED).keep_in(tmp_path / "there")
    check_here(tmp_path / "there", "latest")
    check_here(tmp_path / "there", None)  # it has ended before there was a checkpoint
    kept(tmp_path / "there", 1)
    with pytest.raises(PlanError, match="has a training already"):
        check_here(tmp_path / "there", None)


def test_another_training_there_is_refused_before_anything_is_sent(host: LoopbackHost, begun: Begun) -> None:
    there = kept(host.home / "manyhands" / "runs" / "taken", 5, events="{}\n")
    (there / "plan.yaml").write_text("its own")
    here = host.manyhands_home / "runs" / "taken"
    with pytest.raises(PlanError, match=r"server1 has a training in .*taken already"):
        begun(here)
    kept(here, 10, events='{"another": 1}\n{}\n')
    (there / "events.jsonl").write_text('{"something else": 1}\n{}\n{}\n')
    with pytest.raises(PlanError, match="server1 has another training in"):
        begun(here, "resume=latest")
    assert not (here / "host.json").exists()


@pytest.mark.parametrize("here_too", [True, False])
def test_another_plan_is_refused_and_changes_nothing(
    host: LoopbackHost, begun: Begun, here_too: bool
) -> None:
    here = host.manyhands_home / "runs" / f"planned-{here_too}"
    record, _ = begun(here)
    end(here)
    there = Path(record.parts[0].directory)
    for directory in (here, there) if here_too else (there,):
        kept(directory, 5)
    before = [(directory / "plan.yaml").read_text() for directory in (here, there)]
    with pytest.raises(Refused, match=r"belongs to another plan \(local.steps is 5 there and 7 here\)"):
        begun(here, f"resume={here}", "local.steps=7")
    assert [(directory / "plan.yaml").read_text() for directory in (here, there)] == before
    begun(here, f"resume={here}")


def test_the_name_of_a_directory_is_the_runs(host: LoopbackHost, begun: Begun, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the run would be called '\.\.' on the host"):
        begun(tmp_path / "a" / "..")
    assert not (host.home / "manyhands" / "plan.yaml").exists()
