from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from manyhands.engine.configuration import configure
from manyhands.errors import PlanError
from manyhands.ui.main import run

CONF = Path(str(files("manyhands") / "conf"))
GROUPS = ("parallel", "schedule", "model", "logging", "evaluation", "data", "optimizer", "outer", "codec")
NEEDS = {"data=tokens": ["task.tokenizer.kind=file", "task.tokenizer.path=gpt2"]}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(["config", "show", *arguments]) == 0
    return capsys.readouterr().out


def test_groups_choose_plan_and_engine_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel=fsdp", "schedule=cosine", "model=gpt2_124m", "logging=tensorboard", "evaluation=full"]
    values = json.loads(shown(capsys, *words, "schedule.warmup_steps=5", "--format", "json"))
    assert values["parallel"]["strategy"] == "fsdp"
    assert values["schedule"] == {**values["schedule"], "kind": "cosine", "warmup_steps": 5}
    assert values["task"]["model"] == {"n_layer": 12, "n_head": 12, "n_embd": 768}
    assert values["task"]["block_size"] == 1024
    assert values["logging"]["tensorboard"] is True
    assert values["evaluation"]["max_batches"] == 1_000_000


def test_what_is_shown_is_a_file_for_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel=fsdp_checkpointing", "data=parquet", "task.text.path=x", "exec.precision=bf16"]
    file = tmp_path / "again.yaml"
    file.write_text(shown(capsys, *words), encoding="utf-8")
    again, once = configure(plan_file=file), configure(words)
    assert (again.plan, again.settings) == (once.plan, once.settings)
    file.write_text(shown(capsys, *words, "--only", "plan"), encoding="utf-8")
    assert run(["server", "validate", "--plan", str(file), "--format", "json"]) == 0
    capsys.readouterr()
    assert list(yaml.safe_load(shown(capsys, "--only", "engine"))) == [
        "parallel",
        "exec",
        "logging",
        "checkpoints",
    ]


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_of_a_group_is_valid(group: str) -> None:
    options = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    assert options
    for option in options:
        choice = f"{group}={option}"
        assert configure([choice, *NEEDS.get(choice, [])]).as_yaml()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("parallel=fspd", "parallel 'fspd' does not exist. Did you mean 'fsdp'?"),
        ("steps=3", "unknown key 'steps'. Did you mean 'local.steps'?"),
        ("task=tabular generated_rows=60", "Did you mean 'task.table.generated_rows'?"),
        ("lr=3", "unknown key 'lr'. Did you mean 'local.optimizer.lr' or 'outer.lr'?"),
        ("paralel=fsdp", "unknown key 'paralel'. Did you mean 'parallel'?"),
        ("logging=tb", "logging 'tb' does not exist. Known: jsonl, tensorboard, wandb."),
        ("processes=2", "processes says how a training is started"),
    ],
)
def test_what_does_not_exist(word: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "show", *word.split()]) in (2, 3)
    assert told in capsys.readouterr().err


def test_copied_configs_come_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine"
    assert run(["config", "copy", str(mine)]) == 0
    assert {file.relative_to(mine) for file in mine.rglob("*.yaml")} == {
        file.relative_to(CONF) for file in CONF.rglob("*.yaml")
    }
    capsys.readouterr()
    (mine / "schedule" / "mine.yaml").write_text("kind: wsd\nwarmup_steps: 7\n", encoding="utf-8")
    (mine / "parallel" / "ddp.yaml").write_text("strategy: ddp\nmicro_batch_size: 3\n", encoding="utf-8")
    (mine / "schedule" / "cosine.yaml").unlink()
    own = ["--config-dir", str(mine), "--format", "json"]
    values = json.loads(shown(capsys, "schedule=mine", "parallel=ddp", *own))
    assert values["schedule"]["warmup_steps"] == 7
    assert values["parallel"]["micro_batch_size"] == 3
    assert json.loads(shown(capsys, "schedule=cosine", *own))["schedule"]["kind"] == "cosine"
    assert run(["train", "--config-dir", str(mine), "--cfg", "job", "schedule=mine"]) == 0
    assert "warmup_steps: 7" in capsys.readouterr().out
    assert run(["config", "copy", str(mine)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_table_says_what_each_setting_means(capsys: pytest.CaptureFixture[str]) -> None:
    table = shown(capsys, "exec.precision=bf16", "--format", "table", "--only", "engine")
    (line,) = [line for line in table.splitlines() if "exec.precision" in line]
    assert line.startswith("* exec.precision")
    assert " bf16 " in line
    assert "Default: fp32." in table
    assert "rounds.total" not in table
    assert "rounds.total" in shown(capsys, "--format", "table")


@pytest.mark.parametrize(
    ("words", "devices", "machines", "processes"),
    [
        ([], None, 1, 1),
        (["processes=3"], None, 1, 3),
        (["parallel.tensor_parallelism=2"], None, 1, 2),
        (["parallel.data_parallelism=2", "parallel.tensor_parallelism=2"], None, 1, 4),
        (["parallel.data_parallelism=4"], None, 2, 2),
        (["parallel.data_parallelism=2"], [1], 1, 1),  # which is then refused for what it is
        (["processes=2", "parallel.tensor_parallelism=4"], None, 2, 2),
        (["processes=2"], [0, 3], 1, 2),
    ],
)
def test_as_many_processes_as_are_meant(
    words: list[str], devices: list[int] | None, machines: int, processes: int
) -> None:
    assert configure(words).processes(devices, machines) == processes


def test_devices_and_processes_that_differ() -> None:
    with pytest.raises(PlanError, match=r"devices 0,1,2 are 3, processes=2: give one of the two"):
        configure(["processes=2"]).processes([0, 1, 2])


def test_who_is_started_by_itself_starts_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["parallel.tensor_parallelism=2"]
    assert configure([*words, "rank=1", "world_size=2"]).processes(None) == 1
    monkeypatch.setenv("RANK", "1")  # torchrun's
    assert configure(words).processes(None) == 1
