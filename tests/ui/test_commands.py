"""The commands that need no running server, as processes."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import yaml

from manyhands.ui.commands.client_train import NOT_YET
from manyhands.ui.main import run

Run = Callable[..., subprocess.CompletedProcess[str]]


# ---------------------------------------------------------------------------------- identities
def test_new_identity_then_show(manyhands: Run, tmp_path: Path) -> None:
    made = manyhands("client", "new-identity", "--identity-secret-key-path", "keys/me.key")
    key = tmp_path / "keys" / "me.key"
    assert made.returncode == 0
    assert re.fullmatch(r"[0-9a-f]{64}\n", made.stdout)
    assert key.stat().st_size == 32
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key.read_bytes().hex() not in made.stdout
    shown = manyhands("client", "show-identity", "--identity-secret-key-path", "keys/me.key")
    assert shown.stdout == made.stdout


def test_new_identity_never_overwrites(manyhands: Run, tmp_path: Path) -> None:
    (tmp_path / "me.key").write_bytes(b"precious")
    done = manyhands("client", "new-identity", "--identity-secret-key-path", "me.key")
    assert done.returncode == 5
    assert (tmp_path / "me.key").read_bytes() == b"precious"


@pytest.mark.parametrize(("size", "mode", "words"), [(31, 0o600, "32"), (32, 0o644, "chmod 600")])
def test_bad_key_files(manyhands: Run, tmp_path: Path, size: int, mode: int, words: str) -> None:
    key = tmp_path / "bad.key"
    key.write_bytes(b"x" * size)
    key.chmod(mode)
    done = manyhands("client", "show-identity", "--identity-secret-key-path", "bad.key")
    assert done.returncode == 5
    assert words in done.stderr


# --------------------------------------------------------------------------------------- plans
def test_validate_prints_every_setting(manyhands: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("name: mine\npreset: diloco\ntask: {name: dummy}\n")
    done = manyhands("server", "validate", "--plan", "plan.yaml", "rounds.total=7")
    assert done.returncode == 0, done.stderr
    assert "Plan 'mine'" in done.stdout
    assert re.search(r"^\* rounds\.total +7 ", done.stdout, re.MULTILINE)
    assert "plan hash" in done.stdout


def test_validate_as_json(manyhands: Run) -> None:
    done = manyhands("server", "validate", "--plan", "demo", "--format", "json")
    settings = {row["path"]: row for row in json.loads(done.stdout)}
    assert settings["topology"]["value"] == "star"
    assert settings["preset"] == {
        "path": "preset",
        "value": "diloco",
        "default": None,
        "changed": True,
        "meaning": settings["preset"]["meaning"],
    }
    assert settings["preset"]["meaning"]


@pytest.mark.parametrize(
    ("plan", "overrides", "words"),
    [
        ("name: x\nlocl: {steps: 3}\n", [], "Did you mean 'local'?"),
        ("name: x\n", ["local.step=3"], "Did you mean 'local.steps'?"),
        ("name: x\n", ["local.steps=many"], "local.steps"),
        ("name: [\n", [], "plan.yaml"),
        ("name: x\n", ["task.model.n_layr=3"], "Did you mean 'n_layer'?"),
        ("", [], "plan.yaml says nothing"),
    ],
)
def test_bad_plans(manyhands: Run, tmp_path: Path, plan: str, overrides: list[str], words: str) -> None:
    (tmp_path / "plan.yaml").write_text(plan)
    done = manyhands("server", "validate", "--plan", "plan.yaml", *overrides)
    assert done.returncode == 3, done.stderr
    assert words in done.stderr
    assert done.stdout == ""


def test_a_missing_plan_file(manyhands: Run) -> None:
    done = manyhands("server", "run", "--plan", "nowhere/plan.yaml")
    assert done.returncode == 3
    assert "nowhere/plan.yaml" in done.stderr


def test_config_show_is_a_plan_file(manyhands: Run, tmp_path: Path) -> None:
    shown = manyhands("config", "show", "--plan", "mesh", "rounds.total=9")
    (tmp_path / "again.yaml").write_text(shown.stdout)
    again = manyhands("config", "show", "--plan", "again.yaml", "--format", "json")
    plan = json.loads(again.stdout)
    assert plan["topology"] == "mesh"
    assert plan["rounds"]["total"] == 9


# ------------------------------------------------------------------------------- client train
REQUIRED = ["client", "train", "--run-id", "r", "--server-addr", "127.0.0.1:1"]


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_what_is_not_available_is_refused_by_name(manyhands: Run, name: str) -> None:
    option = "--" + name.replace("_", "-")
    done = manyhands(*REQUIRED, option, "2")
    assert done.returncode == 2
    assert f"{option} 2 is not available yet: " in done.stderr


def test_every_flag_of_psyche_is_known(manyhands: Run) -> None:
    known = (
        "server-addr run-id identity-secret-key-path bind-p2p-port bind-p2p-interface tui logs data-parallelism "
        "tensor-parallelism micro-batch-size write-gradients-dir eval-tasks eval-fewshots eval-seed "
        "eval-test-max-docs checkpoint-dir hub-repo keep-steps write-log optim-stats-steps grad-accum-in-fp32 "
        "dummy-training-delay-secs wandb-project wandb-run wandb-group wandb-entity"
    )
    text = manyhands("client", "train", "--help").stdout
    assert [flag for flag in known.split() if f"--{flag}" not in text] == []


def test_join_is_client_train(manyhands: Run) -> None:
    text = manyhands("client", "train", "--help").stdout.replace("manyhands client train", "manyhands join")
    assert manyhands("join", "--help").stdout == text


def test_a_client_may_have_several_devices(manyhands: Run) -> None:
    done = manyhands(*REQUIRED, "--tensor-parallelism", "2", "--data-parallelism", "2")
    assert done.returncode == 6  # and then there is no server


def test_logs_and_tui_that_contradict(manyhands: Run) -> None:
    done = manyhands(*REQUIRED, "--tui", "--logs", "json")
    assert done.returncode == 2
    assert "contradict" in done.stderr


def test_no_server(manyhands: Run) -> None:
    done = manyhands(*REQUIRED)
    assert done.returncode == 6
    assert "127.0.0.1:1" in done.stderr


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost:abc", "http://127.0.0.1:8700/", ":8700", "h:0"])
@pytest.mark.parametrize(
    "words", [["client", "train", "--run-id", "r"], ["server", "status"], ["runs", "ls"]]
)
def test_an_address_is_host_and_port(
    words: list[str], address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--server-addr", address]) == 2
    assert f"'{address}' is not HOST:PORT, as in 127.0.0.1:8700" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- server
def test_a_port_in_use(manyhands: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = manyhands("server", "run", "--plan", "dummy", "--port", port)
    assert done.returncode == 6
    assert port in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize("words", [["pause"], ["resume"], ["kick", "--client", "ab"]])
def test_orders_need_the_operators_key(manyhands: Run, words: list[str]) -> None:
    done = manyhands("server", *words, "--server-addr", "127.0.0.1:1", "--run-id", "r")
    assert done.returncode == 5
    assert "operator" in done.stderr


def test_status_without_a_server(manyhands: Run) -> None:
    assert manyhands("server", "status", "--server-addr", "127.0.0.1:1").returncode == 6


def test_backup_and_ledger_without_a_database(manyhands: Run) -> None:
    for words in (["server", "backup", "--to", "copy.db"], ["ledger", "r"]):
        done = manyhands(*words)
        assert done.returncode == 9
        assert "manyhands.db" in done.stderr


# --------------------------------------------------------------------------------------- train
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rank=0"], "rank and world_size belong together"),
        (["rank=4", "world_size=4"], "ranks go from 0 to 3"),
        (["rank=0", "world_size=2", "processes=2"], "give one of the two"),
        (["master_addr=a"], "master_addr and master_port belong together"),
        (["paralell.strategy=fsdp"], "Did you mean 'parallel'"),
        (["parallel.strategy=zero"], "'parallel.strategy' is 'zero'"),
        (["local.batch_size=7", "rank=0", "world_size=2"], "cannot be divided among 2 processes: choose 6"),
        (
            ["parallel.tensor_parallelism=3", "rank=0", "world_size=2", "local.batch_size=6"],
            "start a multiple",
        ),
    ],
)
def test_train_refuses_processes_that_do_not_fit(manyhands: Run, words: list[str], message: str) -> None:
    done = manyhands("train", *words)
    assert done.returncode == 3
    assert message in done.stderr


def test_train_prints_the_configuration_that_it_would_use(manyhands: Run) -> None:
    done = manyhands(
        "train", "optimizer.lr=3e-4", "--micro-batch-size", "3", "model.n_layer=2", "--cfg", "job"
    )
    assert done.returncode == 0, done.stderr
    shown = yaml.safe_load(done.stdout)
    assert shown["local"]["optimizer"]["lr"] == 3e-4
    assert shown["task"]["model"]["n_layer"] == 2
    assert shown["parallel"]["micro_batch_size"] == 3
    assert shown["exec"]["restarts"] == 2


def test_a_sweep_trains_each_combination(manyhands: Run) -> None:
    done = manyhands("train", "seed=1,2", "optimizer.lr=1e-3,2e-3", "--cfg", "job", "--multirun")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed: 1\n") == done.stdout.count("seed: 2\n") == 2
    assert "[4/4] seed=2 optimizer.lr=0.002" in done.stderr


TABLE = ("task=tabular", "task.table.generated_rows=60", "rounds.total=1", "local.steps=2")


@pytest.mark.slow
def test_each_of_a_sweep_has_a_directory_of_its_own(manyhands: Run, tmp_path: Path) -> None:
    done = manyhands(
        "train", "-m", *TABLE, "--logs", "none", "seed=1,2", "--directory", str(tmp_path / "sweep")
    )
    assert done.returncode == 0, done.stderr
    seeds = [yaml.safe_load((tmp_path / "sweep" / n / "plan.yaml").read_text())["seed"] for n in ("1", "2")]
    assert seeds == [1, 2]
    done = manyhands("train", "-m", *TABLE, "--logs", "none", "seed=1,2", "run=one")
    assert done.returncode == 2
    assert re.search(
        r"the trainings would share the directory \S+/runs/one: give --directory", done.stderr
    ), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("-m", "seed=1,2"), ("processes=2",), ("-m", "seed=1,2", "processes=2")])
def test_debug_reaches_the_processes_of_a_training(manyhands: Run, words: tuple[str, ...]) -> None:
    done = manyhands("train", *TABLE, "--debug", "task.target=nowhere", *words, "--logs", "none", timeout=120)
    assert done.returncode == 4, done.stderr
    assert "Traceback" in done.stderr


@pytest.mark.slow
def test_a_sweep_that_ended_early_goes_on(manyhands: Run, tmp_path: Path) -> None:
    runs = tmp_path / "home" / "runs"
    done = manyhands("train", "-m", *TABLE, "--logs", "none", "local.optimizer.lr=0.1,bad")
    assert done.returncode == 3
    assert "'local.optimizer.lr' is 'bad': expected a number" in done.stderr
    assert not runs.exists(), "all are looked at before the first begins"

    done = manyhands("train", "-m", *TABLE, "--logs", "none", "seed=3", "task.target=target,nowhere")
    assert done.returncode == 4
    assert (
        "[2/2] task.target=nowhere ended with exit code 4; mend that, and the same command with resume=latest goes on"
        in done.stderr
    )
    (first,) = [run.name for run in runs.iterdir() if (run / "checkpoints").is_dir()]
    done = manyhands(
        "train", "-m", *TABLE, "--logs", "none", "task.target=target", "seed=3,4", "resume=latest"
    )
    assert done.returncode == 0, done.stderr
    trained = {run.name for run in runs.iterdir() if (run / "checkpoints").is_dir()}
    assert len(trained) == 2, "the one that was there goes on"
    assert first in trained


@pytest.mark.slow
def test_latest_finds_the_training_with_other_settings_too(manyhands: Run, tmp_path: Path) -> None:
    small = [*TABLE, "resume=latest"]
    first = manyhands("train", *small, "seed=2", "exec.threads=1")
    assert first.returncode == 0, first.stderr
    assert "it begins at step 0" in first.stdout
    broken = tmp_path / "home" / "runs" / "broken"
    (broken / "checkpoints" / "step-00000001").mkdir(parents=True)
    (broken / "plan.yaml").write_text("data: nothing of ours\n")
    first = manyhands("train", *small[:-1])  # under a name of its own
    assert first.returncode == 0, first.stderr
    again = manyhands("train", *small, "logging.every_steps=1", "parallel.strategy=fsdp", "run_id=other")
    assert again.returncode == 0, again.stderr
    assert "resumed at step 2" not in again.stdout, "a plan with a run id is another plan"
    again = manyhands("train", *small, "logging.every_steps=1", "parallel.strategy=fsdp")
    assert again.returncode == 0, again.stderr
    assert "resumed at step 2" in again.stdout
    other = manyhands("train", *small, "exec.precision=bf16")
    assert other.returncode == 0, other.stderr
    assert "resumed at step 2" not in other.stdout, "in another precision it is another training"


@pytest.mark.slow
def test_train_then_resume_and_list(manyhands: Run, tmp_path: Path) -> None:
    """A tiny model on one file, its checkpoint, an exact end, and the listing of runs."""
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    small = [
        "name=tiny",
        "task.text.path=text.txt",
        "task.tokenizer.kind=byte",
        "task.model={n_layer: 1, n_head: 2, n_embd: 16}",
        "task.block_size=16",
        "rounds.total=2",
        "local.steps=3",
        "local.batch_size=2",
        "evaluation.max_batches=2",
    ]
    done = manyhands("train", *small, "--directory", "out", "--logs", "json", timeout=120)
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line)["kind"] for line in done.stdout.splitlines()]
    assert kinds[-1] == "finished"
    assert (tmp_path / "out" / "plan.yaml").exists()
    # Resuming a finished training needs no plan again, and ends where it was.
    again = manyhands("train", "--resume", "out", "--logs", "console", timeout=120)
    assert again.returncode == 0, again.stderr
    assert "in 6 steps" in again.stdout


@pytest.mark.slow
def test_sigterm_of_a_training_saves_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    words = [
        "task.text.path=text.txt",
        "task.tokenizer.kind=byte",
        "task.model={n_layer: 1, n_head: 2, n_embd: 16}",
    ]
    training = subprocess.Popen(
        [
            Path(sys.executable).with_name("manyhands"),
            "train",
            *words,
            "rounds.total=5000",
            "--directory",
            "out",
        ],
        cwd=tmp_path,
        env={**os.environ, "MANYHANDS_HOME": str(tmp_path / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert training.stdout is not None
    assert any("step 10/" in line for line in training.stdout)
    children = psutil.Process(training.pid).children(recursive=True)
    training.terminate()
    _, told = training.communicate(timeout=60)
    assert training.returncode == 130
    assert "SIGTERM: saving and leaving by step " in told
    assert "go on with --resume" in told
    assert list((tmp_path / "out" / "checkpoints").glob("step-*"))
    assert not any(child.is_running() for child in children)
