"""What is sent and how it is started, on a real host; the trainings are ended before they have loaded anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from manyhands.engine.configuration import Configuration, configure
from manyhands.engine.settings import EngineSettings
from manyhands.errors import DataError, MissingExtra, PlanError, StorageError
from manyhands.hosts.hosts_file import Host
from manyhands.hosts.inputs import inputs_of
from manyhands.hosts.launch import Job, configured_for, environment_of_job
from manyhands.hosts.record import Record, recorded
from manyhands.plan.needs import Package
from manyhands.plan.schema import Plan
from manyhands.plan.tasks import CustomTask
from manyhands.tasks.chess_endgames.pieces import needed_tables, parse
from manyhands.ui.bench.loopback_host import LoopbackHost

Begun = Callable[..., tuple[Record, list[str]]]


def test_a_mount_is_used_when_there_is_one(host: LoopbackHost, begun: Begun) -> None:
    host.write_hosts(PathToOutputFromHost=str(host.manyhands_home))
    here = host.manyhands_home / "runs" / "mounted"
    record, _ = begun(here)
    assert record.shared
    assert record.parts[0].directory == str(here)
    assert (here / "job.json").is_file()
    assert recorded(here) == record


def test_without_the_mount_it_is_told_and_results_come_back(host: LoopbackHost, begun: Begun) -> None:
    host.write_hosts(PathToOutputFromHost="/nowhere/cout")
    record, told = begun(host.manyhands_home / "runs" / "alone")
    assert not record.shared
    assert record.parts[0].directory == str(host.home / "manyhands" / "runs" / "alone")
    assert "server1: /nowhere/cout is missing, so results come back over the connection" in told


def test_the_code_of_a_task_of_ones_own_is_sent(
    host: LoopbackHost, begun: Begun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("FAMILY = None\n")
    plan = tmp_path / "plan.yaml"
    plan.write_text("task: {name: custom, target: 'mine:FAMILY'}\n")
    record, _ = begun(host.manyhands_home / "runs" / "own", plan_file=plan, allowed=("mine:FAMILY",))
    there = Path(record.parts[0].directory)
    assert (there / "code" / "mine.py").read_text() == "FAMILY = None\n"
    job = json.loads((there / "job.json").read_text())
    assert job["environment"]["PYTHONPATH"] == str(there / "code")
    assert job["command"][-2:] == ["--allow-task", "mine:FAMILY"]
    plan.write_text("task: {name: custom, target: 'other:FAMILY'}\n")
    with pytest.raises(PlanError, match=r"there is no other\.py here .*run this where it lies"):
        inputs_of(configure(plan_file=plan).plan, ("other:FAMILY",))


def test_so_is_what_lies_beside_it_and_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "mine.py": "import json, torch\ndef late():\n    from layers.norm import Norm\n",
        "layers/__init__.py": "from .norm import Norm\nimport shapes as s\n",
        "layers/norm.py": "import mine\n",
        "layers/table.json": "{}",
        "shapes.py": "this is no Python",
        "other.py": "",
        "data/rows.csv": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "plan.yaml").write_text("task: {name: custom, target: 'mine:FAMILY'}\n")
    plan = configure(plan_file=tmp_path / "plan.yaml").plan
    sent = {each.name for each in inputs_of(plan, ("mine:FAMILY",)).files}
    modules = {"mine.py", "layers/__init__.py", "layers/norm.py", "layers/table.json", "shapes.py"}
    assert sent == {f"code/{name}" for name in modules}


def test_what_is_too_large_to_send_must_be_there(
    place_of_both: Path, host: LoopbackHost, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = place_of_both
    (tmp_path / "small.csv").write_text("a,target\n1,2\n")
    (tmp_path / "large.csv").write_text("a,target\n" + "1,2\n" * 100)
    words = ["task=tabular", f"task.table.files=[{tmp_path}/small.csv,{tmp_path}/large.csv]"]
    monkeypatch.setattr("manyhands.hosts.inputs.LARGEST_BYTES", 100)
    inputs = inputs_of(configure(words).plan)
    assert [sent.name for sent in inputs.files] == ["inputs/00-small.csv"]
    assert inputs.elsewhere == inputs.large == (str(tmp_path / "large.csv"),)
    # the loopback host sees the same file system, so the path holds there
    record, _ = begun(host.manyhands_home / "runs" / "large", *words, "task.table.generated_rows=null")
    assert str(tmp_path / "large.csv") in (Path(record.parts[0].directory) / "plan.yaml").read_text()


def test_of_syzygy_tables_only_those_that_are_needed(tmp_path: Path) -> None:
    needed = needed_tables(parse("KPkp").endings[0])
    for name in (*needed, "KQQvK.rtbw", "KQQvK.rtbz", "KPvK.rtbz"):
        (tmp_path / name).write_bytes(b"table")
    plan = configure(["task=chess_endgames", "task.pieces=KPkp", f"task.syzygy={tmp_path}"]).plan
    assert {Path(sent.name).name for sent in inputs_of(plan).files} == set(needed)


def test_paths_of_a_task_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "rows.npz").write_bytes(b"rows")
    settings = {
        "file": str(tmp_path / "rows.npz"),
        "deep": [{"where": str(tmp_path / "rows.npz")}],
        "text": "a/b",
    }
    plan = Plan(task=CustomTask(target="mine:FAMILY", settings=settings))
    inputs = inputs_of(plan)
    assert [sent.name for sent in inputs.files] == ["inputs/00-rows.npz"]  # once
    assert isinstance(inputs.plan.task, CustomTask)
    there = "inputs/00-rows.npz"
    assert inputs.plan.task.settings == {"file": there, "deep": [{"where": there}], "text": "a/b"}


def test_code_that_is_not_allowed_is_refused_before_anything_is_sent(
    host: LoopbackHost, begun: Begun, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("task: {name: custom, target: 'mine:FAMILY'}\n")
    with pytest.raises(
        PlanError, match=r"'task.target' is 'mine:FAMILY'.*start again with --allow-task mine"
    ):
        begun(host.manyhands_home / "runs" / "not-allowed", plan_file=plan)
    assert not (host.home / "manyhands" / "runs" / "not-allowed").exists()


def test_a_separator_is_no_path() -> None:
    settings = {"separator": "/", "here": "./", "up": "../", "home": "~/"}
    inputs = inputs_of(Plan(task=CustomTask(target="mine:FAMILY", settings=settings)))
    assert not inputs.files
    assert isinstance(inputs.plan.task, CustomTask)
    assert inputs.plan.task.settings == settings


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["task.pieces=QPk"], "White has 0 kings in 'QPk'"),
        (["task.pieces=KPkp"], "Any mirror of the Syzygy tables"),
        (["task.pieces=KPkp", "task.syzygy=nowhere/tables"], "nowhere/tables is not there"),
    ],
)
def test_endings_that_no_host_has_are_refused_here(words: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        inputs_of(configure(["task=chess_endgames", *words]).plan)


def test_hosts_with_one_home_are_refused(host: LoopbackHost, begun: Begun) -> None:
    host.write_hosts({"HostName": "server2"})
    with pytest.raises(PlanError, match=r"have .*runs/together in common, as with one home on both"):
        begun(host.manyhands_home / "runs" / "together", on=("server1", "server2"))


def test_one_that_failed_before_its_first_checkpoint_is_begun_again(host: LoopbackHost, begun: Begun) -> None:
    here = host.manyhands_home / "runs" / "again"
    record, _ = begun(here)
    record.with_ending("server1", {"state": "ended", "exit_code": 4}).keep_in(here)
    begun(here)


def test_a_directory_here_that_cannot_be_made(host: LoopbackHost, begun: Begun, tmp_path: Path) -> None:
    assert host.sshd_pid
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another --directory"):
        begun(tmp_path / "file" / "run")


def test_a_host_without_a_package_that_the_plan_needs(
    host: LoopbackHost, begun: Begun, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = Package(module="no_such_module", extra="lora", option="task.adapter")
    with monkeypatch.context() as patched:
        patched.setattr(Configuration, "packages", lambda _: (lacking,))
        with pytest.raises(
            MissingExtra, match=r"server1 has no package 'no_such_module', which task\.adapter"
        ):
            begun(host.manyhands_home / "runs" / "lacking")
    monkeypatch.setattr("manyhands.hosts.beginning.EXPORTING", ("no_such_module",))
    _, told = begun(host.manyhands_home / "runs" / "no-export")
    assert any(
        "cannot export checkpoints as ONNX (`manyhands hosts setup server1 --extras onnx`" in t for t in told
    )


def test_shards_of_this_machine_are_sent_once(host: LoopbackHost, begun: Begun, tmp_path: Path) -> None:
    shards = tmp_path / "KPkp"
    (shards / "training").mkdir(parents=True)
    (shards / "manifest.json").write_text("{}")
    (shards / "training" / "0.parquet").write_bytes(b"rows" * 1000)
    record, told = begun(host.manyhands_home / "runs" / "sharded", upload=shards)
    there = Path(record.parts[0].directory)
    (place,) = (there.parent.parent / "shards").iterdir()
    assert place.name.startswith("KPkp-")
    assert (place / "training" / "0.parquet").read_bytes() == b"rows" * 1000
    assert f"shards: ../../shards/{place.name}" in (there / "plan.yaml").read_text()
    assert any(text.startswith("sending 2 files of shards") for text in told)
    _, told = begun(host.manyhands_home / "runs" / "again", upload=shards)
    assert "sent 0 MiB of shards; the rest was there" in told


def test_what_a_host_has_of_its_own_holds_there(tmp_path: Path) -> None:
    entry = {
        "HostName": "a",
        "OverridePyTorchCompileMode": "max-autotune",
        "Environment": {"NCCL_DEBUG": "INFO"},
    }
    host = Host.parse(entry, where="a test")
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    configuration = configure(
        ["task=tabular", f"task.table.files=[{tmp_path / 'rows.csv'}, /data/other.csv]", "task.target=b"]
    )
    inputs = inputs_of(configuration.plan)
    assert [sent.name for sent in inputs.files] == ["inputs/00-rows.csv"]
    assert inputs.elsewhere == ("/data/other.csv",)
    texts = configured_for(host, configuration, inputs)
    assert "compile: max-autotune" in texts["engine.yaml"]
    there = EngineSettings.parse(yaml.safe_load(texts["engine.yaml"]), where="a test")
    assert there.exec.compile != configuration.settings.exec.compile
    assert there.common() == configuration.settings.common()  # so the processes of two hosts go together
    other = configure(["exec.precision=bf16"]).settings
    assert other.common() != configuration.settings.common()
    assert "inputs/00-rows.csv" in texts["plan.yaml"]
    environment = environment_of_job(host, Job(run="r", inputs=inputs, devices=(3, 1)), "/runs/r")
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["NCCL_DEBUG"]) == ("3,1", "INFO")
    assert "PYTHONPATH" not in environment


@pytest.mark.parametrize(
    ("device", "devices", "processes", "needed"),
    [
        ("auto", None, 4, None),
        ("cpu", None, 1, None),
        ("cuda:3", None, 1, (3,)),
        ("cuda", None, 2, (0, 1)),
        ("cuda", (5,), 1, (5,)),
    ],
)
def test_the_gpus_that_a_host_must_have(
    device: str, devices: tuple[int, ...] | None, processes: int, needed: tuple[int, ...] | None
) -> None:
    job = Job(run="a", inputs=inputs_of(Plan(), ()), device=device, devices=devices, processes=processes)
    assert job.gpus() == needed
